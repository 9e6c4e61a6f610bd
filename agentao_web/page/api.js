// Talks to the server: who we are, what it answers, what went wrong. Nothing here touches the page.

import { pause } from "./dom.js";

// Relative to this file, so that it works behind any prefix.
const ROOT = new URL("../", import.meta.url);
const TOKEN = "agentao-token";

/** The server said no: {code, message, details} and its status. */
export class ApiError extends Error {
  constructor(status, body, retryAfter) {
    const limit = body?.details?.limit;
    const most = typeof limit === "number" ? ` (limit: ${limit.toLocaleString("en")})` : "";
    super(`${body?.message || `The server answered with status ${status}.`}${most}`);
    this.status = status;
    this.code = body?.code || "unknown";
    this.details = body?.details || {};
    this.retryAfter = retryAfter;
  }

  /** Whether the same request may well succeed in a moment. */
  get passes() {
    return [502, 504].includes(this.status) || ["draining", "store_unavailable", "no_stream_slot", "too_many_streams"].includes(this.code) ||
      (this.status === 503 && this.code === "unknown");
  }
}

/** No answer at all: the network, or the server, is not there. */
export class NetworkError extends Error {}

export const token = {
  get: () => sessionStorage.getItem(TOKEN),
  set: (value) => sessionStorage.setItem(TOKEN, value),
  forget: () => sessionStorage.removeItem(TOKEN),
};

let signIn = async () => {};
/** Seconds the server's clock is ahead of ours. */
let ahead = 0;

/** *ask(wasRefused)* returns when there is a reason to try again. */
export function signInWith(ask) {
  signIn = ask;
}

/** The server's time, in Unix seconds. */
export const now = () => Date.now() / 1000 + ahead;

/** The response, whatever its status but 401: then somebody is asked to sign in, and it is sent again. */
export async function open(method, path, { body, headers = {}, signal } = {}) {
  for (;;) {
    const used = token.get();
    const sent = { Accept: "application/json", ...headers };
    if (used) sent.Authorization = `Bearer ${used}`;
    if (body !== undefined) sent["Content-Type"] = "application/json";
    let response;
    try {
      response = await fetch(new URL(path, ROOT), { method, body, headers: sent, signal, credentials: "same-origin" });
    } catch (error) {
      if (signal?.aborted) throw error;
      throw new NetworkError("The server cannot be reached.");
    }
    const date = Date.parse(response.headers.get("Date"));
    // It is cut to whole seconds.
    if (date) ahead = (date + 500 - Date.now()) / 1000;
    if (response.status !== 401) return response;
    // Somebody may have signed in since this was sent.
    if (used === token.get()) await signIn(Boolean(used));
    // People take their time, which is not the network's.
    if (signal?.aborted) throw new NetworkError("Not sent again after signing in.");
  }
}

/** The JSON of an answer; ApiError if it is none of success. */
export async function call(method, path, { json, ...options } = {}) {
  const body = json === undefined ? options.body : JSON.stringify(json);
  const response = await open(method, path, { ...options, body });
  if (!response.ok) throw await refusal(response);
  try {
    return await response.json();
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new NetworkError("The answer broke off.");
  }
}

export async function refusal(response) {
  let body = null;
  try {
    body = await response.json();
  } catch {
    // Not one of ours: a proxy's.
  }
  return new ApiError(response.status, body, Number(response.headers.get("Retry-After")) || 0);
}

/**
 * Try *attempt()* again while the server is away or about to be back; *waiting(error)* hears of it.
 * It throws what went wrong last, at once when *signal* is aborted.
 */
export async function persist(attempt, waiting, signal) {
  for (let tries = 0; ; tries++) {
    try {
      return await attempt();
    } catch (error) {
      const passes = error instanceof NetworkError || (error instanceof ApiError && error.passes && tries < 8);
      if (!passes || signal?.aborted) throw error;
      waiting(error);
      await pause(error.retryAfter ? error.retryAfter * 1000 : Math.min(8000, 500 * 2 ** tries), signal);
      if (signal?.aborted) throw error;
    }
  }
}

const at = (sid) => encodeURIComponent(sid);

export const config = () => call("GET", "page/config.json");
export const sessions = (page) => call("GET", `sessions?limit=30${page ? `&page=${encodeURIComponent(page)}` : ""}`);
export const snapshot = (sid) => call("GET", `session/${at(sid)}`);
export const rename = (sid, title) => call("PATCH", `session/${at(sid)}`, { json: { title } });
export const remove = (sid) => call("DELETE", `session/${at(sid)}`);
export const cancel = (sid) => call("POST", `chat/${at(sid)}/cancel`);
export const answer = (sid, json) => call("POST", `chat/${at(sid)}/answer`, { json });
export const messages = (sid, before) => call("GET", `session/${at(sid)}/messages${before ? `?before=${before}` : ""}`);
export const events = (sid, query) => `chat/${at(sid)}/events?${new URLSearchParams(query)}`;

/** Start a turn. *body* is the JSON as text: the same text with the same *key* is the same turn. */
export const start = (sid, body, key) =>
  call("POST", `chat/${at(sid)}`, { body, headers: { "Idempotency-Key": key } });
