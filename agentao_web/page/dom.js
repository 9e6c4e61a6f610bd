// Builds elements and says times. Text goes in as text: there is no way to pass HTML here.

/** An element: h("button.quiet", {onclick, "aria-label": "…"}, child, "text", …). */
export function h(name, props = {}, ...children) {
  const [tag, ...classes] = name.split(".");
  const element = document.createElement(tag);
  if (classes.length) element.className = classes.join(" ");
  for (const [key, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

/**
 * What a person would not see, or would see in another place than it is: controls, marks of
 * direction, characters without a shape. The joiners of an emoji are part of a picture.
 */
const JOINER = "(?<=[\\p{Extended_Pictographic}\\p{Emoji_Modifier}\\ufe0f])\\u200d(?=\\p{Extended_Pictographic})|(?<=\\p{Emoji})\\ufe0f";
const BLANK = "\\u034f\\u115f\\u1160\\u17b4\\u17b5\\u180b-\\u180f\\u2800\\u3164\\uffa0\\ufe00-\\ufe0f\\u{e0100}-\\u{e01ef}";
const UNSEEN = new RegExp(`(?!${JOINER})(?![\\n\\t])[\\p{C}\\p{Zl}\\p{Zp}${BLANK}]`, "gu");
/** Empty space that pushes what comes after it out of sight. */
const EMPTY_LINES = /(?:[^\S\n]*\n){4,}/gu;
const BLANKS = /[^\S\n]{20,}/gu;

/** *text* with everything in it visible, for what a person decides about. */
export function visible(text) {
  return String(text)
    .replace(UNSEEN, (found) => `⟨U+${found.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`)
    .replace(EMPTY_LINES, (found) => `\n⟨${found.split("\n").length - 1} line breaks⟩\n`)
    .replace(BLANKS, (found) => ` ⟨${found.length} blanks⟩ `);
}

const ICONS = {
  send: "M12 19V5M5 12l7-7 7 7",
  stop: "M7 7h10v10H7z",
  plus: "M12 5v14M5 12h14",
  menu: "M4 7h16M4 12h16M4 17h16",
  close: "M6 6l12 12M18 6L6 18",
  image: "M4 5h16v14H4zM4 16l5-5 4 4 3-3 4 4M15 9h.01",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  check: "M5 12.5l4.5 4.5L19 7.5",
  edit: "M4 20h4L19 9l-4-4L4 16zM13 7l4 4",
  trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13M10 11v5M14 11v5",
  retry: "M4 12a8 8 0 1 1 2.5 5.8M4 20v-5h5",
  tool: "M14.5 6.5a4 4 0 0 0-5 5L4 17v3h3l5.5-5.5a4 4 0 0 0 5-5L15 12l-3-3z",
  shield: "M12 3l7 3v5c0 5-3 8-7 10-4-2-7-5-7-10V6z",
  ask: "M9 9a3 3 0 1 1 4 2.8c-.7.3-1 .8-1 1.7M12 17.5h.01M12 3a9 9 0 1 0 0 18 9 9 0 0 0 0-18",
  down: "M12 5v14M5 12l7 7 7-7",
  theme: "M12 3a9 9 0 1 0 9 9 7 7 0 0 1-9-9z",
  out: "M14 4h5v16h-5M4 12h11M8 8l-4 4 4 4",
};

/** A drawing that says nothing to a screen reader: its button has to. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  for (const [key, value] of [["viewBox", "0 0 24 24"], ["class", "icon"], ["aria-hidden", "true"]]) {
    svg.setAttribute(key, value);
  }
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/** A button with a drawing and a name. */
export function iconButton(name, label, onclick, classes = "quiet") {
  return h(`button.${classes}`, { type: "button", "aria-label": label, title: label, onclick }, icon(name));
}

/** A button that copies what *text()* says, and says that it did. */
export function copyButton(label, text) {
  const button = h("button.quiet.copy", { type: "button", "aria-label": label, title: label }, icon("copy"));
  button.addEventListener("click", async () => {
    const done = await copy(text());
    button.replaceChildren(icon(done ? "check" : "close"));
    announce(done ? "Copied" : "Could not copy");
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  });
  return button;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Plain http has no clipboard.
    const area = h("textarea.away", { readonly: true });
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

/** Tell a screen reader, when it has nothing else to say. */
export function announce(text) {
  document.getElementById("announcer").textContent = text;
}

export function duration(ms) {
  if (ms < 1000) return `${Math.round(ms)} ms`;
  if (ms < 60_000) return `${(ms / 1000).toFixed(1)} s`;
  return `${Math.floor(ms / 60_000)} min ${Math.round((ms % 60_000) / 1000)} s`;
}

export function clock(seconds) {
  const left = Math.max(0, Math.floor(seconds));
  return `${Math.floor(left / 60)}:${String(left % 60).padStart(2, "0")}`;
}

const ticking = new Set();

/**
 * Call *tick* now and every second until it gives false, or *element* is not in the page, where it
 * has to be put at once.
 */
export function everySecond(element, tick) {
  if (tick() !== false) ticking.add({ element, tick });
}

setInterval(() => {
  for (const one of ticking) {
    if (!one.element.isConnected || one.tick() === false) ticking.delete(one);
  }
}, 1000);

/** Resolves after that time, or before it when the network is back or *signal* is aborted. */
export function pause(ms, signal) {
  return new Promise((resolve) => {
    const over = new AbortController();
    const end = () => {
      clearTimeout(timer);
      over.abort();
      resolve();
    };
    const timer = setTimeout(end, ms);
    addEventListener("online", end, { signal: over.signal });
    signal?.addEventListener("abort", end, { signal: over.signal });
  });
}

/** A random id: crypto.randomUUID() is not there on plain http. */
export function randomId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => byte.toString(36).padStart(2, "0")).join("");
}
