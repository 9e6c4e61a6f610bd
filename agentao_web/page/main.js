// Puts the parts of the page together: which chat is open, what is shown around it, the keys.

import * as api from "./api.js";
import { Composer } from "./composer.js";
import { Conversation } from "./conversation.js";
import { h, icon, randomId, visible } from "./dom.js";
import { loginIs, signIn } from "./login.js";
import { Sidebar } from "./sidebar.js";

const $ = (id) => document.getElementById(id);
const SUGGESTIONS = ["What can you do here?", "Which files can you see?", "Ask me three questions about my project, then sum it up"];
const DEMO = ["help", "write plan.txt: Ship it on Friday.", "ask me Which colour? red, green or blue", "count to 40"];
/** A tab nobody looks at holds no stream for longer than this, unless its agent is at work. */
const HIDDEN_FOR = 60_000;

let demo = false;
let fresh = null;
let sticks = true;
let hiddenTimer = null;
const small = matchMedia("(max-width: 820px)");

for (const element of document.querySelectorAll("[data-icon]")) element.prepend(icon(element.dataset.icon));

const conversation = new Conversation($("turns"), {
  changed: () => changed(),
  connection: (good) => connection(good),
  gone: () => gone(),
  listed: () => void sidebar.refresh().then(() => named()),
  edit: (message, images) => (composer.set(message, images), composer.focus()),
  focusComposer: () => composer.focus(),
  trouble: (error) => trouble(error),
});
const composer = new Composer($("composer"), {
  send: (message, images, busy) => {
    sticks = true;
    void conversation.send(message, images, busy);
  },
  stop: () => void conversation.stop(),
});
const sidebar = new Sidebar($("chats"), $("more"), {
  open: (sid) => go(sid),
  removed: (sid) => sid === conversation.sid && newChat(),
  renamed: (sid) => sid === conversation.sid && named(),
  trouble: (error) => trouble(error),
});

// -- which chat ----------------------------------------------------------------------------------

function go(sid) {
  drawer(false);
  if (sid === conversation.sid) return;
  if (location.hash.slice(1) === sid) void show(sid);
  else location.hash = sid;
}

function newChat() {
  fresh = `c-${randomId()}`;
  go(fresh);
  composer.focus();
}

async function show(sid) {
  $("trouble").hidden = true;
  sticks = true;
  sidebar.select(sid);
  composer.open(sid);
  composer.busy(false);
  $("scroll").setAttribute("aria-busy", "true");
  await conversation.open(sid, { fresh: sid === fresh });
  if (sid !== conversation.sid) return;
  fresh = null;
  $("scroll").removeAttribute("aria-busy");
  named();
}

function gone() {
  conversation.close();
  void sidebar.refresh();
  newChat();
  trouble(new Error("That chat was deleted."));
}

function named() {
  const title = visible(sidebar.title(conversation.sid) || conversation.title || "New chat");
  $("title").textContent = title;
  document.title = `${conversation.openQuestion ? "● " : ""}${title}`;
}

addEventListener("hashchange", () => {
  const sid = location.hash.slice(1);
  if (/^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$/.test(sid)) void show(sid);
  else newChat();
});

// -- around it -----------------------------------------------------------------------------------

function changed() {
  const live = conversation.live;
  composer.busy(live.some((turn) => turn.state !== "sending"));
  $("welcome").hidden = !conversation.empty || $("turns").childElementCount > 0;
  named();
  scrolled();
  needed();
}

/** Say that somebody is needed, where the question itself is out of sight. */
function needed() {
  const question = conversation.openQuestion;
  const seen = question && isSeen(question.element);
  $("waiting").hidden = !question || seen;
  if (question) $("waiting-for").textContent = question.title;
}

function isSeen(element) {
  const box = $("scroll").getBoundingClientRect();
  const { top, bottom } = element.getBoundingClientRect();
  return bottom > box.top + 60 && top < box.bottom - 60;
}

function connection(good) {
  const lost = !good || !navigator.onLine;
  if ($("connection").hidden === !lost) return;
  $("connection").hidden = !lost;
  $("connection").textContent = lost ? "No connection. Trying again…" : "";
}

function trouble(error) {
  $("trouble").hidden = false;
  $("trouble-text").textContent = error.message;
}

function suggest() {
  $("suggestions").replaceChildren(
    ...(demo ? DEMO : SUGGESTIONS).map((text) =>
      h("li", {}, h("button", { type: "button", onclick: () => (composer.set(text), composer.focus()) }, text)),
    ),
  );
  $("demo-note").hidden = !demo;
}

function drawer(open) {
  $("app").classList.toggle("drawer", open);
  $("menu").setAttribute("aria-expanded", String(open));
  $("side").inert = small.matches && !open;
  $("main").inert = small.matches && open;
  if (open) $("new").focus();
}

function scrolled() {
  const box = $("scroll");
  if (sticks) box.scrollTop = box.scrollHeight;
  $("latest").hidden = sticks || box.scrollHeight <= box.clientHeight;
}

$("scroll").addEventListener("scroll", () => {
  const box = $("scroll");
  sticks = box.scrollHeight - box.scrollTop - box.clientHeight < 80;
  $("latest").hidden = sticks;
  needed();
});
new ResizeObserver(scrolled).observe($("turns"));
$("latest").addEventListener("click", () => ((sticks = true), scrolled(), composer.focus()));
$("new").addEventListener("click", newChat);
$("new-small").addEventListener("click", newChat);
$("menu").addEventListener("click", () => drawer(true));
$("shut").addEventListener("click", () => (drawer(false), $("menu").focus()));
$("shade").addEventListener("click", () => drawer(false));
$("review").addEventListener("click", () => conversation.openQuestion?.focus());
$("trouble-close").addEventListener("click", () => ($("trouble").hidden = true));
$("skip").addEventListener("click", () => composer.focus());
$("forget").addEventListener("click", () => {
  api.token.forget();
  location.reload();
});
small.addEventListener("change", () => drawer(false));

const THEMES = { system: "light", light: "dark", dark: "system" };
function theme(value) {
  document.documentElement.dataset.theme = value;
  localStorage.setItem("agentao-theme", value);
  $("theme-name").textContent = `Colours: ${value}`;
}
$("theme").addEventListener("click", () => theme(THEMES[document.documentElement.dataset.theme] ?? "light"));

addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.defaultPrevented || document.querySelector("dialog[open]")) return;
  if ($("app").classList.contains("drawer")) {
    drawer(false);
    $("menu").focus();
  } else if (conversation.live.some((turn) => turn.id && turn.state !== "stopping")) {
    void conversation.stop();
  }
});

// Without an answer there is nothing to go on with.
$("login").addEventListener("cancel", (event) => event.preventDefault());

// -- sleep, network, other tabs ------------------------------------------------------------------

addEventListener("online", () => (conversation.wake({ anew: true }), void sidebar.refresh()));
addEventListener("offline", () => (connection(false), conversation.wake({ anew: true })));
document.addEventListener("visibilitychange", () => {
  clearTimeout(hiddenTimer);
  if (document.hidden) {
    hiddenTimer = setTimeout(() => conversation.live.length || conversation.pauseReading(), HIDDEN_FOR);
  } else {
    conversation.wake();
    void sidebar.refresh().then(named);
  }
});

// -- begin ---------------------------------------------------------------------------------------

api.signInWith(async (wasRefused) => {
  await signIn(wasRefused);
  $("forget").hidden = !api.token.get();
});
theme(document.documentElement.dataset.theme);
drawer(false);
try {
  const told = await api.persist(api.config, () => connection(false));
  loginIs(told);
  demo = told.demo;
} catch (error) {
  trouble(error);
}
suggest();
$("forget").hidden = !api.token.get();
await sidebar.refresh();
const first = location.hash.slice(1);
if (/^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$/.test(first)) await show(first);
else newChat();
document.documentElement.dataset.ready = "true";
