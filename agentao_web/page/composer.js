// Where people write: text, images, and what to do while the agent is busy.

import { announce, h, iconButton } from "./dom.js";

const KINDS = ["image/png", "image/jpeg", "image/gif", "image/webp"];
const DRAFT = "agentao-draft-";

export class Composer {
  #images = [];
  #sid = null;
  #busy = false;

  /** *on*: {send(message, images, busy), stop()}. */
  constructor(form, on) {
    this.on = on;
    this.form = form;
    this.text = form.querySelector("textarea");
    this.shelf = form.querySelector(".shelf");
    this.trouble = form.querySelector(".trouble");
    this.stopButton = form.querySelector("#stop");
    this.sendButton = form.querySelector("#send");
    this.interruptButton = form.querySelector("#interrupt");
    this.file = form.querySelector("input[type=file]");
    form.addEventListener("submit", (event) => (event.preventDefault(), this.#send(this.#busy ? "queue" : undefined)));
    this.interruptButton.addEventListener("click", () => this.#send("interrupt"));
    this.stopButton.addEventListener("click", () => on.stop());
    form.querySelector("#attach").addEventListener("click", () => this.file.click());
    this.file.addEventListener("change", () => void this.attach([...this.file.files]).then(() => (this.file.value = "")));
    this.text.addEventListener("input", () => this.#wrote());
    this.text.addEventListener("keydown", (event) => this.#key(event));
    this.text.addEventListener("paste", (event) => this.#paste(event));
    this.#drop(document.body);
  }

  #key(event) {
    // While a word is being composed Enter belongs to the keyboard of the language.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    this.#send(event.ctrlKey || event.metaKey ? (this.#busy ? "interrupt" : undefined) : this.#busy ? "queue" : undefined);
  }

  #send(busy) {
    const message = this.text.value.trim();
    if (!message) {
      if (this.#images.length) this.#complain("Write something about the image, too.");
      return;
    }
    const images = this.#images;
    this.set("", []);
    this.on.send(message, images, busy);
    this.focus();
  }

  /** Another chat is open: its own draft is in the box. */
  open(sid) {
    this.#sid = sid;
    this.set(sessionStorage.getItem(DRAFT + sid) ?? "", []);
  }

  set(text, images = []) {
    this.text.value = text;
    this.#images = images;
    this.#complain("");
    this.#showShelf();
    this.#wrote();
  }

  focus() {
    this.text.focus({ preventScroll: true });
  }

  busy(busy) {
    this.#busy = busy;
    this.#buttons();
  }

  #wrote() {
    this.text.style.height = "auto";
    this.text.style.height = `${Math.min(this.text.scrollHeight, innerHeight * 0.4)}px`;
    try {
      if (this.text.value) sessionStorage.setItem(DRAFT + this.#sid, this.text.value);
      else sessionStorage.removeItem(DRAFT + this.#sid);
    } catch {
      // Too long to be kept over a reload.
    }
    this.#buttons();
  }

  #buttons() {
    const something = this.text.value.trim() !== "" || this.#images.length > 0;
    const focused = document.activeElement === this.stopButton;
    this.stopButton.hidden = !this.#busy;
    this.interruptButton.hidden = !(this.#busy && something);
    this.sendButton.hidden = this.#busy && !something;
    this.sendButton.disabled = !something;
    const label = this.#busy ? "Send after this answer" : "Send";
    this.sendButton.setAttribute("aria-label", label);
    this.sendButton.title = label;
    if (focused && this.stopButton.hidden) this.focus();
  }

  // -- images ----------------------------------------------------------------------------------

  #paste(event) {
    const files = [...(event.clipboardData?.files ?? [])];
    if (!files.length) return;
    event.preventDefault();
    void this.attach(files);
  }

  #drop(target) {
    const isFile = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
    target.addEventListener("dragover", (event) => {
      if (!isFile(event)) return;
      event.preventDefault();
      target.classList.add("dropping");
    });
    for (const kind of ["dragleave", "drop"]) {
      target.addEventListener(kind, (event) => {
        if (kind === "drop" || event.relatedTarget === null) target.classList.remove("dropping");
      });
    }
    target.addEventListener("drop", (event) => {
      if (!isFile(event)) return;
      event.preventDefault();
      void this.attach([...event.dataTransfer.files]);
    });
  }

  async attach(files) {
    const sid = this.#sid;
    const good = files.filter((file) => KINDS.includes(file.type));
    let trouble = good.length < files.length ? "Only PNG, JPEG, GIF and WebP images can be attached." : "";
    const read = [];
    for (const file of good) {
      try {
        const url = await dataUrl(file);
        read.push({ name: file.name, mimeType: file.type, data: url.slice(url.indexOf(",") + 1) });
      } catch {
        trouble = `${file.name} cannot be read.`;
      }
    }
    // Another chat was opened meanwhile: they are not for that.
    if (sid !== this.#sid) return;
    this.#images.push(...read);
    this.#complain(trouble);
    if (read.length) announce(read.length === 1 ? "Image attached" : `${read.length} images attached`);
    this.#showShelf();
    this.#buttons();
    this.focus();
  }

  #showShelf() {
    this.shelf.replaceChildren(
      ...this.#images.map((image) =>
        h(
          "figure",
          {},
          h("img", { src: `data:${image.mimeType};base64,${image.data}`, alt: image.name ?? "" }),
          // One that is sent again after a reload has lost its name.
          iconButton("close", `Remove ${image.name ?? "image"}`, () => {
            this.#images = this.#images.filter((one) => one !== image);
            this.#showShelf();
            this.#buttons();
            this.focus();
          }),
        ),
      ),
    );
    this.shelf.hidden = !this.#images.length;
  }

  #complain(text) {
    this.trouble.textContent = text;
  }
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(reader.error));
    reader.readAsDataURL(file);
  });
}
