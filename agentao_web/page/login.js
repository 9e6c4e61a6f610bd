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
      h("button.primary", { type: "submit" }, "Continue"),
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (field.value.trim()) give(field.value.trim());
    });
    const host = told.login === "host";
    dialog.replaceChildren(
      h("h2", { id: "login-title" }, wasRefused ? "Please sign in again" : "Sign in"),
      h("p", { id: "login-why" }, why(wasRefused, host)),
      host ? h("div.actions", {}, h("button.primary", { type: "button", onclick: () => give(null) }, "I have signed in")) : form,
      told.demo
        ? h(
            "div.demo",
            {},
            h("p", {}, "This is the demo: its token is ", h("code", {}, "dev"), "."),
            h("button", { type: "button", onclick: () => give("dev") }, "Use the demo token"),
          )
        : "",
    );
    if (!dialog.open) dialog.showModal();
    (host ? dialog.querySelector("button") : field).focus();
  });
}

function why(wasRefused, host) {
  if (host) return "This site wants to know who you are. Sign in there, in another tab, and come back: what you wrote stays here.";
  if (wasRefused) return "Your token is not valid, or not any more. What you wrote stays here, and goes on once you have signed in.";
  return "Paste the token you were given. It stays in this tab only.";
}
