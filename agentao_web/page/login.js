// Asks for a token when the server wants one, once for everybody who waits for it.

import { token } from "./api.js";
import { h } from "./dom.js";

let waiting = null;
let told = { login: "token", demo: false };

export function loginIs(config) {
  told = config;
}

/** Resolves when there is a reason to try again: a token, or a login of the host's. */
export function signIn(wasRefused) {
  waiting ??= ask(wasRefused).finally(() => (waiting = null));
  return waiting;
}

function ask(wasRefused) {
  const dialog = document.getElementById("login");
  const back = document.activeElement;
  const host = told.login === "host";
  const demo = told.demo && !host; // a host with a login of its own knows no demo token
  return new Promise((resolve) => {
    const give = (value) => {
      if (value) token.set(value);
      else token.forget();
      dialog.close();
      back?.focus?.();
      resolve();
    };
    const field = h("input", {
      type: "password", id: "token", autocomplete: "off", spellcheck: "false", required: true, "aria-describedby": "login-why",
    });
    const form = h(
      "form",
      {},
      h("label", { for: "token" }, "Access token"),
      field,
      h(demo ? "button" : "button.primary", { type: "submit" }, "Continue"),
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (field.value.trim()) give(field.value.trim());
    });
    const reason = h("p", { id: "login-why" }, ...(host ? theirs() : [why(wasRefused)]));
    const offer = demo
      ? h(
          "div.demo",
          {},
          h("p", {}, "This is the demo: its token is ", h("code", {}, "dev"), "."),
          h("button.primary", { type: "button", onclick: () => give("dev") }, "Use the demo token"),
        )
      : "";
    dialog.replaceChildren(
      h("h2", { id: "login-title" }, wasRefused ? "Please sign in again" : "Sign in"),
      ...(wasRefused ? [reason, offer] : [offer, reason]),
      host ? h("div.actions", {}, h("button.primary", { type: "button", onclick: () => give(null) }, "I have signed in")) : "",
      host ? "" : form,
    );
    if (!dialog.open) dialog.showModal();
    (host || demo ? dialog.querySelector("button") : field).focus();
    if (host) whenBack(dialog, () => give(null));
  });
}

/** Somebody comes back to this tab, perhaps signed in by now. */
function whenBack(dialog, again) {
  const over = new AbortController();
  dialog.addEventListener("close", () => over.abort(), { once: true });
  const look = () => document.hidden || again();
  document.addEventListener("visibilitychange", look, { signal: over.signal });
}

/** What to do about a login of the host's; its front page is where to begin, if that is not us. */
function theirs() {
  const site = new URL("/", location.href).href;
  const there = site === new URL(".", location.href).href ? "Sign in there" : h("a", { href: site, target: "_blank", rel: "noopener" }, "Sign in there");
  return ["This site wants to know who you are. ", there, ", in another tab, and come back: what you wrote stays here."];
}

function why(wasRefused) {
  if (wasRefused) return "Your token is not valid, or not any more. What you wrote stays here, and goes on once you have signed in.";
  return "Paste the token you were given. It stays in this tab only.";
}
