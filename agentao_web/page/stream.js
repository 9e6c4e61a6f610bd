// Reads one session's log by its cursor, for as long as it is told to: as a stream, or by
// long-poll where streams do not come through. No event is told twice.

import * as api from "./api.js";

/** A stream says something at once (an event or a comment): later than this it is held back. */
const FIRST_BYTE = 5_000;
/** Three times the server's heartbeat: the line is dead. */
const SILENCE = 45_000;
/** How long we stay with long-polls before a stream is tried again. */
const POLLS_FOR = 300_000;
const WAIT = 25;

export class Reader {
  #sid;
  #on;
  #cursor = null;
  #run = null;
  #pollUntil = 0;
  #noSlotUntil = 0;

  /** *on*: {event, state, connection, gone}. */
  constructor(sid, on) {
    this.#sid = sid;
    this.#on = on;
  }

  get cursor() {
    return this.#cursor;
  }

  get running() {
    return this.#run !== null;
  }

  start(cursor) {
    this.stop();
    this.#cursor = cursor;
    const run = { stopped: false, abort: null, wake: () => {}, heard: Date.now() };
    this.#run = run;
    void this.#loop(run);
  }

  stop() {
    if (this.#run === null) return;
    this.#run.stopped = true;
    this.#run.abort?.abort();
    this.#run.wake();
    this.#run = null;
  }

  /** The network is back, or the machine has slept: look now. */
  wake({ anew = false } = {}) {
    const run = this.#run;
    if (run === null) return;
    if (anew || Date.now() - run.heard > SILENCE / 2) run.abort?.abort();
    run.wake();
  }

  async #loop(run) {
    for (let failures = 0; !run.stopped; ) {
      run.abort = new AbortController();
      try {
        await (Date.now() < Math.max(this.#pollUntil, this.#noSlotUntil) ? this.#poll(run) : this.#stream(run));
        failures = 0;
        continue;
      } catch (error) {
        if (run.stopped) return;
        if (error instanceof api.ApiError && error.status === 404) {
          this.#run = null;
          this.#on.gone();
          return;
        }
        if (["no_stream_slot", "too_many_streams"].includes(error.code)) {
          this.#noSlotUntil = Date.now() + 60_000;
          continue;
        }
        if (run.abort.signal.aborted) failures = Math.min(failures, 1);
        failures++;
        if (failures > 1 || !navigator.onLine) this.#on.connection(false);
      }
      await Promise.race([
        new Promise((resolve) => setTimeout(resolve, Math.min(10_000, 250 * 2 ** failures) * (0.7 + Math.random() * 0.6))),
        new Promise((resolve) => (run.wake = resolve)),
      ]);
    }
  }

  async #stream(run) {
    const path = api.events(this.#sid, { after: this.#cursor ?? 0, follow: 1 });
    let timer = this.#deadline(run, FIRST_BYTE);
    let heard = false;
    let bytes = null;
    try {
      const response = await api.open("GET", path, {
        headers: { Accept: "text/event-stream" },
        signal: run.abort.signal,
      });
      if (!response.ok) throw await api.refusal(response);
      if (response.status === 204 || !response.body) return this.#poll(run);
      const frames = new Frames();
      bytes = response.body.pipeThrough(new TextDecoderStream()).getReader();
      for (;;) {
        const { done, value } = await bytes.read();
        if (done) break;
        clearTimeout(timer);
        timer = this.#deadline(run, SILENCE);
        if (!heard) this.#on.connection(true);
        heard = true;
        run.heard = Date.now();
        for (const data of frames.push(value)) this.#tell(run, data);
      }
      if (!heard) throw new api.NetworkError("The stream was empty.");
    } catch (error) {
      const late = run.abort.signal.reason === "late" && !(error instanceof api.NetworkError);
      if (!run.stopped && !heard && late) this.#pollUntil = Date.now() + POLLS_FOR;
      if (error instanceof api.ApiError || run.abort.signal.aborted) throw error;
      throw new api.NetworkError("The stream broke off.");
    } finally {
      clearTimeout(timer);
      // Whatever is left of it is not wanted, and would keep its connection.
      bytes?.cancel().catch(() => {});
    }
  }

  async #poll(run) {
    const noSlot = Date.now() < this.#noSlotUntil;
    const query = { after: this.#cursor ?? 0, wait: noSlot ? 0 : WAIT };
    const timer = this.#deadline(run, (WAIT + 15) * 1000);
    try {
      const page = await api.call("GET", api.events(this.#sid, query), { signal: run.abort.signal });
      this.#on.connection(true);
      run.heard = Date.now();
      for (const event of page.events) this.#tell(run, event);
      if (!run.stopped) this.#on.state(page.state);
      if (noSlot && !page.events.length) {
        await new Promise((resolve) => ((run.wake = resolve), setTimeout(resolve, page.state === "idle" ? 4000 : 1000)));
      }
    } finally {
      clearTimeout(timer);
    }
  }

  #deadline(run, ms) {
    return setTimeout(() => run.abort.abort("late"), ms);
  }

  #tell(run, event) {
    if (run.stopped || (event.seq !== null && this.#cursor !== null && event.seq <= this.#cursor)) return;
    if (event.seq !== null) this.#cursor = event.seq;
    this.#on.event(event);
  }
}

/** Everything that is kept of a session's log up to *end*, a page at a time, without waiting. */
export async function* kept(sid, end) {
  for (let after = null; after === null || after < end; ) {
    const page = await api.call("GET", api.events(sid, { wait: 0, limit: 1000, ...(after === null ? {} : { after }) }));
    if (!page.events.length) return;
    yield page.events;
    after = page.cursor;
  }
}

/** Server-Sent Events out of text that comes in any pieces (HTML, 9.2.6); each message is JSON. */
export class Frames {
  #rest = "";
  #data = [];

  push(text) {
    const found = [];
    // A CR at the end may be half of a CRLF.
    const all = this.#rest + text;
    const lines = all.split(/\r\n|\n|\r(?!$)/);
    this.#rest = lines.pop();
    for (const line of lines) {
      if (line === "") {
        if (this.#data.length) found.push(JSON.parse(this.#data.join("\n")));
        this.#data = [];
      } else if (line.startsWith("data:")) {
        this.#data.push(line.slice(line[5] === " " ? 6 : 5));
      }
    }
    return found;
  }
}
