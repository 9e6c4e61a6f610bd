// What an agent does and asks, as cards: a tool with its output, an approval, a question.

import * as api from "./api.js";
import { clock, duration, everySecond, h, icon, visible } from "./dom.js";

const STATUS = {
  running: "Running",
  ok: "Done",
  error: "Failed",
  cancelled: "Stopped",
  denied: "Not run",
  in_doubt: "Unknown",
};
/** The most of a tool's live output that is kept in the page, in characters. */
const OUTPUT = 100_000;

export class ToolCard {
  #began = api.now();
  #status = "running";
  #output = null;

  constructor(tool, args, began) {
    if (began) this.#began = began;
    this.tool = tool;
    this.chip = h("span.chip.running", {}, STATUS.running);
    this.time = h("span.time");
    this.body = h("div.card-body", {}, ...argumentList(args).filter(Boolean));
    this.element = h(
      "details.card.tool",
      {},
      h("summary", {}, icon("tool"), h("code.name", {}, visible(tool)), h("span.brief", {}, brief(args)), this.time, this.chip),
      this.body,
    );
    everySecond(this.time, () => this.#status === "running" && this.#tick());
  }

  #tick() {
    const passed = api.now() - this.#began;
    if (passed > 2) this.time.textContent = duration(Math.floor(passed) * 1000).replace(".0", "");
    return true;
  }

  output(chunk) {
    if (this.#output === null) {
      this.#output = h("pre.output", { tabindex: "0", role: "region", "aria-label": `Output of ${this.tool}` });
      this.body.append(this.#output);
      this.element.open = true;
    }
    const sticks = this.#output.scrollHeight - this.#output.scrollTop - this.#output.clientHeight < 30;
    this.#output.textContent = (this.#output.textContent + chunk).slice(-OUTPUT);
    if (sticks) this.#output.scrollTop = this.#output.scrollHeight;
  }

  complete(status, ms) {
    this.#status = status;
    this.chip.textContent = STATUS[status] ?? status;
    this.chip.className = `chip ${STATUS[status] ? status : "ok"}`;
    this.time.textContent = ms === undefined || ms === null ? "" : duration(ms);
  }

  result(content, truncated) {
    if (this.body.querySelector(".result")) return;
    const result = h("pre.result", { tabindex: "0", role: "region", "aria-label": `Result of ${this.tool}` });
    result.textContent = content === "" ? "(nothing)" : content;
    this.body.append(h("div.label", {}, truncated ? "Result (shortened)" : "Result"), result);
  }

  /** The turn is over: nothing runs any more. */
  close() {
    if (this.#status === "running") this.complete("in_doubt");
  }
}

/** The argument that says most, on one line. */
function brief(args) {
  const values = Object.values(args ?? {}).filter((value) => ["string", "number"].includes(typeof value));
  return visible(values[0] ?? "").replace(/\s+/g, " ").slice(0, 120);
}

function argumentList(args) {
  const text = (value) => (typeof value === "string" ? value : JSON.stringify(value, null, 2));
  const rows = Object.entries(args ?? {}).map(([name, value]) => [visible(name), visible(text(value))]);
  const isShort = ([, value]) => value.length <= 60 && !value.includes("\n");
  const short = rows.filter(isShort).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)));
  const long = rows.filter((row) => !isShort(row)).flatMap(([name, value]) => {
    const shown = h("pre.args", { tabindex: "0", role: "region", "aria-label": name });
    shown.textContent = value;
    return [h("div.label", {}, name), shown];
  });
  return [short.length ? h("dl", {}, ...short) : null, ...long];
}

/** What a tool says it does, which is written for models: its first sentence, the rest if asked for. */
function explained(description) {
  if (!description) return null;
  description = visible(description);
  const [first] = /^.{1,200}?[.!?](?=\s|$)/su.exec(description) ?? [description];
  const rest = description.slice(first.length).trim();
  const more = rest ? h("details.more", {}, h("summary", {}, "More about this tool"), h("p", {}, rest)) : null;
  return h("div.explained", {}, h("p", {}, first), more);
}

const OUTCOMES = {
  approved: "Allowed",
  denied: "Denied",
  answered: "Answered",
  expired: "Expired: nobody answered in time, so the answer was no",
  cancelled: "Closed: the turn did not wait for it any more",
};
const BY_PEOPLE = new Set(["approved", "denied", "answered"]);
const SPANS = { turn: "for this turn", session: "for this chat" };

/** A question that is open until somebody, here or elsewhere, answers it or its time is over. */
export class QuestionCard {
  #busy = false;

  /** *reply(json)* sends an answer; *done()* puts the focus elsewhere if it was in here. */
  constructor(type, data, { reply, done }) {
    this.id = data.question_id;
    this.open = true;
    this.reply = reply;
    this.done = done;
    this.data = data;
    this.asks = type === "ask_user_requested";
    this.trouble = h("p.trouble", { role: "alert" });
    const title = `q-${this.id}`;
    this.left = h("span.left", { "aria-hidden": "true" });
    this.bar = h("progress.left-bar", { max: "1", value: "1", "aria-label": "Time left to answer" });
    this.element = h(
      "section.card.question",
      { "aria-labelledby": title, tabindex: "-1" },
      h("div.question-head", { id: title }, icon(this.asks ? "ask" : "shield"), h("strong", {}, this.#title()), this.left),
      this.bar,
      h("div.card-body", {}, ...(this.asks ? this.#question() : this.#approval()), this.trouble),
    );
    const whole = Math.max(1, data.expires_at - api.now());
    everySecond(this.element, () => this.open && this.#tick(whole));
  }

  get title() {
    return this.#title();
  }

  #title() {
    if (this.asks) return visible(this.data.header || "The agent has a question");
    return `May it run ${visible(this.data.tool)}?`;
  }

  #tick(whole) {
    const left = this.data.expires_at - api.now();
    this.left.textContent = `${clock(left)} left`;
    this.bar.value = Math.min(1, Math.max(0, left / whole));
    this.element.classList.toggle("urgent", left < 30);
    return true;
  }

  #approval() {
    const { description, args, truncated, remember } = this.data;
    const spans = (remember ?? []).filter((span) => SPANS[span]);
    return [
      explained(description),
      ...argumentList(args),
      truncated ? h("p.warn", {}, "Not all of it can be shown as it is. What is missing here would run too.") : null,
      h(
        "div.actions",
        {},
        this.#button("Allow once", { approve: true }, "primary"),
        ...spans.map((span) => this.#button(`Allow ${SPANS[span]}`, { approve: true, remember: span })),
        this.#button("Deny", { approve: false }, "danger"),
      ),
    ];
  }

  #question() {
    const { question, options, multiple, allow_custom: custom } = this.data;
    const asked = h("p.asked", {}, visible(question));
    if (!multiple) {
      const buttons = (options ?? []).map((option) => this.#button(visible(option), { answer: option }));
      return [asked, buttons.length ? h("div.actions", {}, ...buttons) : null, custom ? this.#custom(buttons.length > 0) : null];
    }
    const boxes = (options ?? []).map((option) => h("input", { type: "checkbox", value: option }));
    const field = custom ? h("input", { type: "text", "aria-label": "Something else", placeholder: "Something else" }) : null;
    const send = () => {
      const answer = boxes.filter((box) => box.checked).map((box) => box.value);
      if (field?.value.trim()) answer.push(field.value.trim());
      if (answer.length) void this.#answer({ answer });
      else this.trouble.textContent = "Choose something first.";
    };
    const form = h("form", {}, ...boxes.map((box) => h("label.choice", {}, box, visible(box.value))), h("div.custom", {}, field, h("button.primary", { type: "submit" }, "Send answer")));
    form.addEventListener("submit", (event) => (event.preventDefault(), send()));
    return [asked, form];
  }

  #custom(hasOptions) {
    const label = hasOptions ? "Something else" : "Your answer";
    const field = h("input", { type: "text", "aria-label": label, placeholder: label, autocomplete: "off" });
    const form = h("form.custom", {}, field, h(hasOptions ? "button" : "button.primary", { type: "submit" }, "Send answer"));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (field.value.trim()) void this.#answer({ answer: field.value.trim() });
    });
    return form;
  }

  #button(label, answer, classes) {
    return h(classes ? `button.${classes}` : "button", { type: "button", onclick: () => void this.#answer(answer) }, label);
  }

  async #answer(answer) {
    if (this.#busy || !this.open) return;
    this.#busy = true;
    this.element.setAttribute("aria-busy", "true");
    this.trouble.textContent = "";
    try {
      const { outcome } = await this.reply({ question_id: this.id, ...answer });
      this.#over(outcome, { remember: answer.remember, answer: answer.answer });
    } catch (error) {
      // Another tab was faster; the event says how, this only in case that it is long gone.
      if (error.code === "question_closed") this.#over(error.details.outcome ?? "cancelled", { by: error.details.by });
      else this.trouble.textContent = error.message;
    } finally {
      this.#busy = false;
      this.element.removeAttribute("aria-busy");
    }
  }

  focus() {
    this.element.scrollIntoView({ block: "nearest" });
    this.element.querySelector("button, input")?.focus();
  }

  close(outcome, by, remember) {
    // While an answer of ours is under way it is taken to be ours; what comes back says so or not.
    if (this.open) this.#over(outcome, { by: this.#busy ? null : by, remember });
  }

  #over(outcome, { by, remember, answer }) {
    this.open = false;
    this.outcome = outcome;
    const focused = this.element.contains(document.activeElement);
    const what = visible(this.asks ? this.data.question : this.data.tool);
    const said = [
      (OUTCOMES[outcome] ?? outcome) + (answer ? `: ${visible([answer].flat().join(", "))}` : ""),
      SPANS[remember],
      BY_PEOPLE.has(outcome) && by && by !== "user" ? `by ${visible(by)}` : null,
    ];
    this.element.className = `card question closed ${outcome in OUTCOMES ? outcome : ""}`;
    this.element.replaceChildren(
      h(
        "div.question-head",
        { id: `q-${this.id}` },
        icon(outcome === "approved" || outcome === "answered" ? "check" : "close"),
        h("span.outcome", {}, said.filter(Boolean).join(" ")),
        this.asks ? h("span.brief", {}, what) : h("code.name", {}, what),
      ),
    );
    if (focused) this.done();
  }
}
