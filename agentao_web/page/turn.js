// One turn as people see it: what was said, what the agent did, how it ended. Events go in.

import { QuestionCard, ToolCard } from "./cards.js";
import { announce, copyButton, duration, h, icon } from "./dom.js";
import { MarkdownView } from "./markdown.js";

const CANCELLED = {
  cancelled_by_user: "Stopped.",
  interrupted: "Stopped for your next message.",
  client_gone: "Stopped, because nobody was reading.",
  server_shutdown: "Stopped, because the server was restarted.",
  session_deleted: "This chat was deleted.",
};
const ENDINGS = {
  timed_out: "Time was up before the answer was whole.",
  cancelled: "Stopped.",
  failed: "This turn failed.",
  incomplete: "The answer is not whole.",
};
const REASONS = {
  length_truncated: "The answer was cut: it was too long for the model.",
  max_iterations: "It took more steps than a turn may have.",
  no_output: "The model said nothing.",
  reasoning_only: "The model thought, and said nothing.",
  stream_cut: "The model's answer broke off.",
  content_filtered: "The provider's content filter stopped this answer.",
  doom_loop: "The model repeated itself and was stopped.",
  budget_exhausted: "The tokens of the day are spent.",
  token_limit: "The turn used as many tokens as one may.",
  tool_limit: "The turn used as many tools as one may.",
  text_limit: "The answer was stopped: it grew too long.",
  context_too_long: "This was too much for the model to read at once. Try a shorter message, or start a new chat.",
};
const LIVE = new Set(["sending", "queued", "running", "waiting", "stopping"]);

export class Turn {
  #text = null;
  #thinking = null;
  #tools = new Map();
  #questions = new Map();
  #hadGap = false;
  /** The open question at the last change that was told. */
  #told = undefined;
  state = "sending";
  message = "";
  images = [];

  /** *act*: {enrich, reply(json), retry(turn), changed(turn), focusComposer}. */
  constructor(id, act) {
    this.id = id;
    this.act = act;
    this.bubble = h("div.bubble");
    this.answer = h("div.answer");
    this.progress = h("div.progress", {}, h("span.dots", { "aria-hidden": "true" }, h("i"), h("i"), h("i")), h("span.now"));
    this.foot = h("div.foot");
    this.usage = h("span.usage");
    this.element = h("article.turn", { "aria-label": "Turn" }, this.bubble, this.answer, this.progress, this.foot);
    this.#shows("Sending…");
  }

  get live() {
    return LIVE.has(this.state);
  }

  get openQuestion() {
    return [...this.#questions.values()].find((card) => card.open);
  }

  said(message, images = []) {
    this.message = message;
    this.images = images;
    const count = typeof images === "number" ? images : 0;
    const shown = Array.isArray(images) ? images : [];
    this.bubble.replaceChildren(
      h("span.away", {}, "You said: "),
      ...shown.map((image) => h("img", { src: `data:${image.mimeType};base64,${image.data}`, alt: image.name || "Attached image" })),
      count ? h("span.attached", {}, icon("image"), count === 1 ? "1 image" : `${count} images`) : "",
      h("div.said", {}, message),
    );
    this.element.setAttribute("aria-label", `You: ${message.slice(0, 80)}`);
  }

  /** Entries of the transcript, which has no more than that of a turn that has ended. */
  recall(entries) {
    for (const entry of entries) {
      if (entry.role === "user") this.said(entry.content, entry.images);
      if (entry.role === "assistant") this.#say(entry.content);
      if (entry.role === "tool") this.#recallTool(entry);
    }
    const status = entries.at(-1).turn_status;
    this.#ended(status ?? "completed", null, {});
  }

  #recallTool({ tool, args, call_id: call, status, duration_ms: ms }) {
    this.#pauseText();
    const card = new ToolCard(tool, args);
    card.complete(status, ms);
    card.element.addEventListener("toggle", () => this.act.enrich());
    this.#tools.set(call, card);
    this.answer.append(card.element);
  }

  /** An event of a turn that is shown out of the transcript. */
  enrich({ type, data }) {
    if (type === "tool_result") this.#tools.get(data.call_id)?.result(data.content, data.truncated);
    if (type === "done" || type === "error") this.#spends(data);
  }

  #spends({ usage = {}, duration_ms: ms, tool_count: tools }) {
    const spent = [
      usage.prompt_tokens ? `${usage.prompt_tokens.toLocaleString("en")} tokens in` : null,
      usage.completion_tokens ? `${usage.completion_tokens.toLocaleString("en")} out` : null,
      tools ? (tools === 1 ? "1 tool" : `${tools} tools`) : null,
      ms ? duration(ms) : null,
    ].filter(Boolean);
    this.usage.textContent = spent.join(" · ");
  }

  /** Begin again: the whole turn comes as events. */
  #clear() {
    this.#text = this.#thinking = null;
    this.#tools.clear();
    this.#questions.clear();
    this.answer.replaceChildren();
    this.foot.replaceChildren();
  }

  problem(text, ...buttons) {
    this.state = "refused";
    this.progress.hidden = true;
    this.foot.replaceChildren(h("p.notice.bad", { role: "alert" }, text), h("div.actions", {}, ...buttons));
    this.act.changed(this);
  }

  waits(text) {
    this.state = "sending";
    this.#shows(text);
    this.foot.replaceChildren();
  }

  /** The server has it. */
  accepted(status) {
    if (this.state !== "sending") return;
    this.state = status === "queued" ? "queued" : "running";
    this.#shows(status === "queued" ? "Queued…" : "Thinking…");
  }

  stopping() {
    if (!this.live) return;
    this.state = "stopping";
    this.#shows("Stopping…");
    this.act.changed(this);
  }

  apply(event) {
    const before = this.state;
    this[`on_${event.type}`]?.(event.data ?? {}, event);
    if (before === this.state && this.openQuestion === this.#told) return;
    this.#told = this.openQuestion;
    this.act.changed(this);
  }

  on_turn_queued({ message, position }) {
    this.#heard(message, undefined);
    this.state = "queued";
    this.#shows(position > 1 ? `Queued: ${position - 1} before it` : "Queued: goes next");
  }

  on_turn_begin({ message, images }) {
    this.#clear();
    this.#heard(message, images);
    this.#runs("Thinking…");
  }

  #heard(message, images) {
    const mine = Array.isArray(this.images) && this.images.length > 0;
    if (!mine) this.said(message, images || this.images);
  }

  on_llm_text({ chunk }) {
    this.#say(chunk);
    this.#runs("Writing…");
  }

  on_thinking({ text }) {
    if (this.#thinking === null) {
      this.#pauseText();
      this.#thinking = h("p");
      this.answer.append(h("details.thinking", {}, h("summary", {}, "Thoughts"), this.#thinking));
    }
    this.#thinking.textContent += text;
    this.#runs("Thinking…");
  }

  on_tool_start({ call_id: call, tool, args }, { ts }) {
    this.#pauseText();
    this.#card(call, tool, args, ts);
    this.#runs(`Using ${tool}…`);
  }

  /** Its card; after a gap its start may not have been heard. */
  #card(call, tool, args, ts) {
    let card = this.#tools.get(call);
    if (card) return card;
    card = new ToolCard(tool, args, ts);
    this.#tools.set(call, card);
    this.answer.append(card.element);
    return card;
  }

  on_tool_output({ call_id: call, tool, chunk }) {
    this.#card(call, tool).output(chunk);
    this.#runs(`Using ${tool}…`);
  }

  on_tool_complete({ call_id: call, tool, status, duration_ms: ms }) {
    this.#card(call, tool).complete(status, ms);
    this.#runs("Thinking…");
  }

  on_tool_result({ call_id: call, tool, content, truncated }) {
    this.#card(call, tool).result(content, truncated);
  }

  on_tool_confirmation(data, event) {
    this.asks(event.type, data);
  }

  on_ask_user_requested(data, event) {
    this.asks(event.type, data);
  }

  asks(type, data) {
    if (this.#questions.has(data.question_id)) return;
    this.#pauseText();
    const card = new QuestionCard(type, data, { reply: this.act.reply, done: this.act.focusComposer });
    this.#questions.set(card.id, card);
    this.answer.append(card.element);
    this.#waitsForPeople();
  }

  on_question_closed({ question_id: id, outcome, by, remember }) {
    this.#questions.get(id)?.close(outcome, by, remember);
    if (this.openQuestion) this.#waitsForPeople();
    else if (this.state === "waiting") this.#runs("Thinking…");
  }

  on_llm_retry({ retry, max_retries: most, delay_s: delay }) {
    this.#runs(`The model did not answer. Trying again in ${Math.round(delay)} s (${retry} of ${most})…`);
  }

  on_context_compressed() {
    this.#note("Older messages were summed up to make room.");
  }

  on_agent_start({ agent, task }) {
    this.#note(`Sub-agent ${agent}: ${String(task ?? "").slice(0, 200)}`);
  }

  on_agent_end({ agent, state }) {
    this.#note(`Sub-agent ${agent}: ${state}`);
  }

  /** What came before is not kept any more. */
  gap() {
    this.#hadGap = true;
    this.#note("A part of this answer is not kept any more.");
  }

  on_done({ status, reason, ...data }, { reply }) {
    if (this.#hadGap && reply) this.#say("", reply);
    this.#ended(status, CANCELLED[reason] ?? REASONS[reason] ?? null, data);
  }

  on_error({ reason, ...data }, { error }) {
    const wait = error?.details?.retry_after;
    const later = Number.isInteger(wait) && wait > 0 ? ` Its provider asks you to wait ${duration(wait * 1000)}.` : "";
    this.#ended("failed", error?.message ? error.message + later : null, data);
  }

  #say(chunk, whole) {
    this.#thinking = null;
    if (this.#text === null) {
      this.#text = new MarkdownView();
      this.answer.append(this.#text.element);
    }
    if (whole === undefined) this.#text.append(chunk);
    else this.#text.finish(whole);
  }

  #pauseText() {
    this.#text?.finish();
    this.#text = this.#thinking = null;
  }

  #note(text) {
    this.#pauseText();
    this.answer.append(h("p.notice", {}, text));
  }

  #runs(text) {
    if (this.state === "stopping") return;
    if (this.openQuestion) return this.#waitsForPeople();
    this.state = "running";
    this.#shows(text);
  }

  #waitsForPeople() {
    if (this.state !== "stopping") this.state = "waiting";
    this.#shows("Waiting for you");
  }

  #shows(text) {
    this.progress.hidden = false;
    this.progress.lastElementChild.textContent = text;
    this.progress.classList.toggle("still", this.state === "waiting" || this.state === "queued");
  }

  #ended(status, text, data) {
    const last = this.#text;
    this.#pauseText();
    for (const card of this.#tools.values()) card.close();
    for (const card of this.#questions.values()) card.close("cancelled");
    this.state = status;
    this.progress.hidden = true;
    const whole = status === "completed";
    const notice = whole ? null : h(`p.notice${status === "failed" ? ".bad" : ""}`, {}, text ?? ENDINGS[status] ?? status);
    const again = whole ? null : h("button", { type: "button", onclick: () => this.act.retry(this) }, icon("retry"), "Try again");
    this.#spends(data);
    this.foot.replaceChildren(
      ...[
        notice,
        again && h("div.actions", {}, again),
        h(
          "div.meta",
          {},
          last ? copyButton("Copy answer", () => last.source) : null,
          this.usage,
        ),
      ].filter(Boolean),
    );
    this.lastText = last?.source ?? "";
    this.notice = notice?.textContent ?? "";
  }

  /** Say the end, or that somebody is needed, to a screen reader. */
  announce() {
    if (this.openQuestion) announce(`The agent waits for you: ${this.openQuestion.title}`);
    else if (!this.live) announce([this.notice, plain(this.lastText)].filter(Boolean).join(" "));
  }
}

/** The beginning of an answer, without the marks of Markdown. */
function plain(text = "") {
  const said = text.replace(/[*_`#>|]+/g, "").replace(/\s+/g, " ").trim();
  return said.length > 600 ? `${said.slice(0, 600)} … the rest is in the conversation.` : said;
}
