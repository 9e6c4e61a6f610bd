// The open chat: its turns, its reader, and what is on its way to the server.

import * as api from "./api.js";
import { h, randomId } from "./dom.js";
import { Reader, kept } from "./stream.js";
import { Turn } from "./turn.js";

const PENDING = "agentao-pending";

export class Conversation {
  sid = null;
  title = "";
  #turns = new Map();
  #sending = new Set();
  #entries = [];
  #more = false;
  #enriched = false;
  #reader = null;
  #visit = new AbortController();
  #line = Promise.resolve();

  /** *list* is where turns go; *on*: {changed, connection, gone, listed, edit, focusComposer, trouble}. */
  constructor(list, on) {
    this.list = list;
    this.on = on;
    this.older = h("button.older", { type: "button", onclick: () => void this.#showOlder() }, "Show earlier messages");
  }

  get live() {
    return [...this.#turns.values(), ...this.#sending].filter((turn) => turn.live);
  }

  get openQuestion() {
    return this.live.map((turn) => turn.openQuestion).find(Boolean);
  }

  get empty() {
    return this.#turns.size + this.#sending.size === 0;
  }

  close() {
    this.#reader?.stop();
    this.#reader = null;
    this.#visit.abort();
  }

  /** Show the chat *sid*: what was said, then what is going on. A *fresh* one has nothing yet. */
  async open(sid, { fresh = false } = {}) {
    this.close();
    const { signal } = (this.#visit = new AbortController());
    const here = () => !signal.aborted;
    this.#line = Promise.resolve();
    Object.assign(this, { sid, title: "" });
    this.#turns.clear();
    this.#sending.clear();
    this.#entries = [];
    this.#more = this.#enriched = false;
    this.list.replaceChildren();
    this.#reader = new Reader(sid, {
      event: (event) => here() && this.#event(event),
      state: (state) => here() && state === "idle" && this.live.length && void this.resync(),
      connection: (good) => here() && this.on.connection(good),
      gone: () => here() && this.on.gone(),
    });
    let found = null;
    try {
      if (!fresh) found = await api.persist(async () => {
        const snapshot = await api.snapshot(sid);
        return here() && { snapshot, page: await api.messages(sid) };
      }, () => this.on.connection(false), signal);
    } catch (error) {
      // A chat that nobody has said anything in is not there yet.
      if (error.status !== 404 && here()) this.#trouble(error);
    }
    if (!here()) return;
    if (found) this.#show(found);
    this.on.connection(true);
    this.#sendAgain();
    this.on.changed();
  }

  #trouble(error) {
    const again = h("button", { type: "button", onclick: () => void this.open(this.sid) }, "Try again");
    this.list.replaceChildren(h("p.notice.bad", { role: "alert" }, error.message), h("div.actions", {}, again));
  }

  #show({ snapshot, page }) {
    this.title = snapshot.title;
    const active = [snapshot.turn, ...snapshot.queued].filter(Boolean);
    const ids = new Set(active.map((turn) => turn.turn_id));
    this.#more = page.more;
    this.#recall(page.messages.filter((entry) => !ids.has(entry.turn_id)));
    for (const one of active) {
      const turn = this.#turn(one.turn_id);
      turn.apply({ type: one.state === "queued" ? "turn_queued" : "turn_begin", data: { message: one.message, position: 1 } });
    }
    for (const { turn_id: id, type, ...data } of snapshot.questions) this.#turns.get(id)?.asks(type, data);
    this.#reader.start(Math.min(snapshot.cursor, ...active.map((turn) => turn.cursor)));
  }

  /** Turns that have ended, out of the transcript, before those that are there. */
  #recall(entries) {
    this.#entries = [...entries, ...this.#entries];
    this.#enriched = false;
    const known = new Set(entries.map((entry) => entry.turn_id));
    const byTurn = Map.groupBy(this.#entries.filter((entry) => known.has(entry.turn_id)), (entry) => entry.turn_id);
    const made = [];
    for (const [id, said] of byTurn) {
      this.#turns.get(id)?.element.remove();
      const turn = new Turn(id, this.#act());
      turn.recall(said);
      turn.recalled = true;
      this.#turns.set(id, turn);
      made.push(turn.element);
    }
    this.older.remove();
    this.list.prepend(...(this.#more ? [this.older] : []), ...made);
  }

  async #showOlder() {
    const { signal } = this.#visit;
    this.older.disabled = true;
    try {
      const page = await api.messages(this.sid, this.#entries[0].id);
      if (signal.aborted) return;
      this.#more = page.more;
      const scroll = this.list.parentElement;
      const below = scroll.scrollHeight - scroll.scrollTop;
      this.#recall(page.messages);
      scroll.scrollTop = scroll.scrollHeight - below;
    } catch (error) {
      this.on.trouble(error);
    } finally {
      this.older.disabled = false;
    }
  }

  /** What the transcript has not, and the log may still have: results of tools, and usage. */
  async #enrich() {
    if (this.#enriched) return;
    this.#enriched = true;
    const { signal } = this.#visit;
    try {
      for await (const events of kept(this.sid, this.#reader.cursor)) {
        if (signal.aborted) return;
        for (const event of events) {
          const turn = this.#turns.get(event.turn_id);
          if (turn?.recalled) turn.enrich(event);
        }
      }
    } catch {
      this.#enriched = false;
    }
  }

  #act() {
    return {
      enrich: () => void this.#enrich(),
      reply: (json) => api.answer(this.sid, json),
      retry: (turn) => this.#retry(turn),
      changed: (turn) => this.#changed(turn),
      focusComposer: () => this.on.focusComposer(),
    };
  }

  #changed(turn) {
    turn.announce();
    this.on.changed();
    if (!turn.live && turn.id && turn.state !== "refused") this.on.listed();
  }

  #turn(id) {
    let turn = this.#turns.get(id);
    if (!turn) {
      turn = new Turn(id, this.#act());
      this.#turns.set(id, turn);
      this.list.append(turn.element);
    }
    return turn;
  }

  // -- what comes ------------------------------------------------------------------------------

  #event(event) {
    if (event.type === "gap") return this.#gap();
    if (event.data?.reason === "session_deleted") return this.on.gone();
    if (!event.turn_id) return;
    const begins = event.type === "turn_begin" || event.type === "turn_queued";
    if (begins && !this.#turns.has(event.turn_id)) this.#adopt(event);
    const turn = this.#turn(event.turn_id);
    // Told by the transcript already, unless all of it comes again.
    if (turn.recalled && !begins) return;
    turn.recalled = false;
    turn.apply(event);
  }

  /** Ours may be told by the log before the POST has been answered. */
  #adopt({ turn_id: id, data }) {
    const turn = [...this.#sending].find((one) => one.state === "sending" && one.message === data.message);
    if (turn) this.#becomes(turn, id);
  }

  #becomes(turn, id) {
    this.#sending.delete(turn);
    turn.id = id;
    this.#turns.set(id, turn);
  }

  #gap() {
    for (const turn of this.live) if (turn.id) turn.gap();
    void this.resync();
  }

  /** The log may not say how a turn ended: see what the server has, and begin again if it differs. */
  async resync() {
    const { signal } = this.#visit;
    try {
      const { turn, queued, cursor } = await api.snapshot(this.sid);
      const active = new Set([turn, ...queued].filter(Boolean).map((one) => one.turn_id));
      const lost = [...this.#turns.values()].some((one) => one.live && !active.has(one.id));
      if (!signal.aborted && lost && this.#reader.cursor >= cursor) await this.open(this.sid);
    } catch {
      // The reader finds out for itself.
    }
  }

  // -- what goes -------------------------------------------------------------------------------

  /** Say *message*; *busy* is what to do if a turn runs: queue or interrupt. */
  send(message, images = [], busy = undefined) {
    // One that is still on its way is going to run by then.
    if ([...this.#sending].some((turn) => turn.live)) busy ??= "queue";
    const sent = images.map(({ data, mimeType }) => ({ data, mimeType }));
    // The turn goes on if this page goes away; it reads the log, not the answer to the POST.
    const body = JSON.stringify({
      message, on_disconnect: "continue",
      ...(sent.length ? { images: sent } : {}),
      ...(busy ? { on_busy: busy } : {}),
    });
    return this.#post({ sid: this.sid, key: randomId(), body }, message, images);
  }

  async #post(pending, message, images) {
    const { signal } = this.#visit;
    const turn = new Turn(null, this.#act());
    turn.said(message, images);
    this.#sending.add(turn);
    this.list.append(turn.element);
    this.on.changed();
    outbox.add(pending);
    // In the order in which they were written. It goes on if another chat is opened.
    const taken = this.#line.then(() => api.persist(
      () => api.start(pending.sid, pending.body, pending.key),
      (error) => turn.waits(error instanceof api.NetworkError ? "No connection. It is sent as soon as there is one…" : "The server is busy. Trying again…"),
    ));
    this.#line = taken.catch(() => {});
    let accepted;
    try {
      accepted = await taken;
    } catch (error) {
      // Of one that nobody sees it is found out again when its chat is opened.
      if (signal.aborted) return;
      outbox.remove(pending);
      this.#refused(turn, error);
      return;
    }
    outbox.remove(pending);
    if (!signal.aborted) this.#started(turn, accepted);
  }

  #started(turn, accepted) {
    const { turn_id: id, cursor, status } = accepted;
    const ended = accepted.reply !== undefined;
    if (this.#turns.has(id) && this.#turns.get(id) !== turn) {
      this.#sending.delete(turn);
      turn.element.remove();
    } else if (this.#sending.has(turn)) {
      this.#becomes(turn, id);
      turn.accepted(status);
    }
    if (ended && this.#reader.running && this.#reader.cursor >= cursor && turn.live) {
      // It was sent before, and all of it has gone by.
      return void this.open(this.sid);
    }
    this.on.listed();
    // Of one that has ended already the cursor is its end.
    if (!this.#reader.running) this.#reader.start(ended ? 0 : cursor);
    this.on.changed();
  }

  #refused(turn, error) {
    const drop = () => {
      this.#sending.delete(turn);
      turn.element.remove();
      this.on.changed();
    };
    const again = (busy) => () => (drop(), void this.send(turn.message, turn.images, busy));
    const button = (label, onclick) => h("button", { type: "button", onclick }, label);
    if (error.code === "session_busy") {
      turn.problem("The agent is still busy with another message.", button("Send after it", again("queue")), button("Interrupt it", again("interrupt")));
    } else {
      const edit = () => (drop(), this.on.edit(turn.message, turn.images));
      turn.problem(error.message, button("Try again", again()), button("Edit", edit));
    }
  }

  /** The same message once more, as a new turn. */
  #retry(turn) {
    if (typeof turn.images === "number" && turn.images > 0) return this.on.edit(turn.message, []);
    return this.send(turn.message, turn.images || [], this.live.length ? "queue" : undefined);
  }

  /** What was on its way when the page went: with its own key it is the same turn. */
  #sendAgain() {
    for (const pending of outbox.all().filter(({ sid }) => sid === this.sid)) {
      const { message, images } = JSON.parse(pending.body);
      void this.#post(pending, message, images ?? []);
    }
  }

  async stop() {
    for (const turn of this.live) turn.stopping();
    try {
      await api.persist(() => api.cancel(this.sid), () => this.on.connection(false));
      setTimeout(() => this.live.length && void this.resync(), 3000);
    } catch (error) {
      this.on.trouble(error);
    }
  }

  pauseReading() {
    this.#reader?.stop();
  }

  /** Somebody looks, or the network is back. */
  wake({ anew = false } = {}) {
    if (this.#reader === null) return;
    if (this.#reader.running) this.#reader.wake({ anew });
    else if (this.#reader.cursor !== null) this.#reader.start(this.#reader.cursor);
    else void this.#appeared();
  }

  /** A chat that was not there may have been begun in another tab. */
  async #appeared() {
    if (this.empty && this.sid) await this.open(this.sid);
  }
}

/** What is on its way, oldest first, over reloads of this tab. */
const outbox = {
  all: () => JSON.parse(sessionStorage.getItem(PENDING) ?? "[]"),
  add(pending) {
    const others = outbox.all();
    if (others.some(({ key }) => key === pending.key)) return;
    try {
      sessionStorage.setItem(PENDING, JSON.stringify([...others, pending]));
    } catch {
      // Too large to be kept: then it is lost if the page goes now.
    }
  },
  remove(pending) {
    const others = outbox.all().filter(({ key }) => key !== pending.key);
    if (others.length) sessionStorage.setItem(PENDING, JSON.stringify(others));
    else sessionStorage.removeItem(PENDING);
  },
};
