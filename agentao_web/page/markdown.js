// Text of a model becomes elements here and nowhere else: Markdown without HTML in it, then the
// sanitizer with a short list, so that each alone would be enough.

import { copyButton, h } from "./dom.js";
import MarkdownIt from "./vendor/markdown-it.esm.min.mjs";
import createDOMPurify from "./vendor/purify.es.mjs";

const purify = createDOMPurify(window);
const TAGS = "a b blockquote br code del em h1 h2 h3 h4 h5 h6 hr img li ol p pre s span strong table tbody td th thead tr ul";
const RULES = {
  ALLOWED_TAGS: TAGS.split(" "),
  ALLOWED_ATTR: ["href", "title", "alt", "src", "class", "start"],
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};
const CLASSES = /^(language-[\w+#.-]{1,40}|center|right|hljs-[\w-]+(?: [\w-]+_?)*)$/;
const LINK = /^(https?:\/\/|mailto:)/i;
const IMAGE = /^data:image\/(png|jpeg|gif|webp);base64,/i;

purify.addHook("uponSanitizeAttribute", (node, data) => {
  if (data.attrName === "class" && !CLASSES.test(data.attrValue)) data.keepAttr = false;
  // Others would lead somewhere on this site, or into another chat.
  if (data.attrName === "href" && !LINK.test(data.attrValue)) data.keepAttr = false;
  if (data.attrName === "src" && !IMAGE.test(data.attrValue)) data.keepAttr = false;
});
purify.addHook("afterSanitizeAttributes", (node) => {
  if (node.nodeName !== "A" || !node.hasAttribute("href")) return;
  node.setAttribute("target", "_blank");
  node.setAttribute("rel", "noopener noreferrer nofollow");
});

const markdown = new MarkdownIt({ html: false, linkify: true, breaks: true });
// Names of files look like domains.
markdown.linkify.set({ fuzzyLink: false, fuzzyEmail: false });
const remote = markdown.renderer.rules.image;
markdown.renderer.rules.image = (tokens, at, options, env, self) => {
  const src = tokens[at].attrGet("src");
  if (IMAGE.test(src)) return remote(tokens, at, options, env, self);
  // Never fetched: that would tell somebody that, and when, it was read.
  const text = markdown.utils.escapeHtml(tokens[at].content || "image");
  return `<a href="${markdown.utils.escapeHtml(src)}">${text} (image)</a>`;
};
markdown.core.ruler.push("aligned", (state) => {
  for (const token of state.tokens) {
    const style = token.attrGet("style")?.replace("text-align:", "");
    if (style) token.attrs = [["class", style]];
  }
});

/** Shows text that grows: what is already there stays, only blocks that changed are made anew. */
export class MarkdownView {
  #source = "";
  #blocks = [];
  #timer = null;
  #cost = 0;

  constructor() {
    this.element = h("div.prose");
  }

  get source() {
    return this.#source;
  }

  append(text) {
    this.#source += text;
    // Not more than a fifth of the time goes into this.
    this.#timer ??= setTimeout(() => this.#render(), Math.max(40, this.#cost * 4));
  }

  /** Nothing more comes; *text*, if given, is all of it. */
  finish(text) {
    if (text !== undefined) this.#source = text;
    this.#blocks = [];
    this.#render(true);
  }

  #render(whole = false) {
    clearTimeout(this.#timer);
    this.#timer = null;
    const began = performance.now();
    const env = {};
    const tokens = markdown.parse(this.#source, env);
    const lines = this.#source.split("\n");
    const made = blocks(tokens).map((block, index) => {
      const text = lines.slice(...span(block)).join("\n");
      const old = this.#blocks[index];
      if (old && old.text === text && old.kind === block[0].type) return old;
      const html = markdown.renderer.render(block, markdown.options, env);
      const node = h("div.block");
      node.append(purify.sanitize(html, RULES));
      for (const pre of node.querySelectorAll("pre")) decorate(pre, whole);
      for (const table of node.querySelectorAll("table")) {
        const frame = h("div.table", { tabindex: "0", role: "region", "aria-label": "Table" });
        table.replaceWith(frame);
        frame.append(table);
      }
      return { text, kind: block[0].type, node };
    });
    for (const [index, { node }] of made.entries()) {
      const there = this.element.children[index];
      if (there === node) continue;
      if (there) there.replaceWith(node);
      else this.element.append(node);
    }
    while (this.element.children.length > made.length) this.element.lastElementChild.remove();
    this.#blocks = made;
    this.#cost = performance.now() - began;
  }
}

/** Tokens of each block that stands at the top. */
function blocks(tokens) {
  const found = [];
  let block = [];
  for (const token of tokens) {
    block.push(token);
    if (token.level === 0 && token.nesting <= 0) {
      found.push(block);
      block = [];
    }
  }
  return block.length ? [...found, block] : found;
}

const span = (block) => block[0].map ?? [0, 0];

/** A frame with the language and a copy button around a block of code. */
function decorate(pre, whole) {
  const code = pre.querySelector("code");
  if (!code) return;
  const language = /^language-(.+)$/.exec(code.className)?.[1] ?? "";
  const frame = h("div.code");
  pre.replaceWith(frame);
  pre.setAttribute("tabindex", "0");
  frame.append(
    h("div.code-head", {}, h("span", {}, language || "text"), copyButton("Copy code", () => code.textContent)),
    pre,
  );
  if (whole && language && code.textContent.length < 50_000) void colour(code, language);
}

async function colour(code, language) {
  const { default: hljs } = await import("./vendor/highlight.min.js");
  if (!hljs.getLanguage(language)) return;
  const html = hljs.highlight(code.textContent, { language, ignoreIllegals: true }).value;
  code.replaceChildren(purify.sanitize(html, RULES));
}
