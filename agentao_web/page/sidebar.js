// The list of chats: open, name, delete.

import * as api from "./api.js";
import { announce, h, iconButton, visible } from "./dom.js";

export class Sidebar {
  #chats = [];
  #next = null;
  #open = null;
  #naming = false;
  #loading = null;

  /** *on*: {open(sid), removed(sid), renamed(sid), trouble(error)}. */
  constructor(list, more, on) {
    this.list = list;
    this.more = more;
    this.on = on;
    more.addEventListener("click", () => {
      this.#loading ??= this.#load(this.#next).finally(() => (this.#loading = null));
    });
  }

  title(sid) {
    return this.#chat(sid)?.title;
  }

  #chat(sid) {
    return this.#chats.find((chat) => chat.session_id === sid);
  }

  /** Look again what there is, as far as it was shown. */
  async refresh() {
    await this.#load(null);
  }

  async #load(page) {
    try {
      const found = await api.sessions(page);
      if (page) this.#chats.push(...found.sessions);
      else this.#chats = this.#merged(found.sessions, found.next);
      if (page || this.#chats.length === found.sessions.length) this.#next = found.next;
      if (!this.#naming) this.#show();
    } catch (error) {
      if (!(error instanceof api.NetworkError)) this.on.trouble(error);
    }
  }

  /** The first page, and those of further pages that were shown. */
  #merged(first, next) {
    if (!next) return first;
    const ids = new Set(first.map((chat) => chat.session_id));
    const last = first.at(-1).updated_at;
    return [...first, ...this.#chats.filter((chat) => chat.updated_at < last && !ids.has(chat.session_id))];
  }

  select(sid) {
    this.#open = sid;
    if (!this.#naming) this.#show();
  }

  #show() {
    const inside = this.list.contains(document.activeElement) ? document.activeElement.dataset.at : null;
    let day = null;
    const rows = [];
    for (const chat of this.#chats) {
      const of = dayOf(chat.updated_at);
      if (of !== day) rows.push(h("li.day", {}, (day = of)));
      rows.push(this.#row(chat));
    }
    this.list.replaceChildren(...rows);
    this.more.hidden = !this.#next;
    if (inside) this.list.querySelector(`[data-at="${CSS.escape(inside)}"]`)?.focus();
  }

  #row(chat) {
    const { session_id: sid } = chat;
    const name = visible(chat.title || "New chat");
    const open = h(
      "button.chat",
      { type: "button", title: name, "data-at": sid, "aria-current": sid === this.#open ? "page" : null, onclick: () => this.on.open(sid) },
      name,
    );
    const row = h("li", {}, open);
    row.append(
      iconButton("edit", `Rename ${name}`, () => this.#rename(row, chat)),
      iconButton("trash", `Delete ${name}`, () => void this.#remove(chat)),
    );
    return row;
  }

  #rename(row, { session_id: sid, title: before }) {
    this.#naming = true;
    const field = h("input", { type: "text", maxlength: "200", "aria-label": "New name" });
    field.value = before;
    const end = async (save) => {
      if (!this.#naming) return;
      this.#naming = false;
      const title = field.value.trim();
      if (save && title && title !== before) {
        try {
          const named = await api.rename(sid, title);
          // Another object than before, if the list was read again meanwhile.
          const chat = this.#chat(sid);
          if (chat) chat.title = named.title;
          this.on.renamed(sid);
          announce("Renamed");
        } catch (error) {
          this.on.trouble(error);
        }
      }
      this.#show();
      this.list.querySelector(`[data-at="${CSS.escape(sid)}"]`)?.focus();
    };
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") event.stopPropagation();
      if (event.key === "Enter" || event.key === "Escape") void end(event.key === "Enter");
    });
    field.addEventListener("blur", () => void end(true));
    row.replaceChildren(field);
    field.select();
    field.focus();
  }

  async #remove({ session_id: sid, title }) {
    const sure = await confirm(`Delete “${title || "New chat"}”?`, "Its messages are gone for good. If the agent is working on it, it is stopped.");
    if (!sure) return;
    try {
      await api.remove(sid);
      this.#chats = this.#chats.filter((chat) => chat.session_id !== sid);
      this.#show();
      this.list.querySelector("[data-at]")?.focus();
      announce("Deleted");
      this.on.removed(sid);
    } catch (error) {
      this.on.trouble(error);
    }
  }
}

function dayOf(seconds) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  const days = Math.ceil((midnight - seconds * 1000) / 86_400_000);
  if (days <= 0) return "Today";
  if (days === 1) return "Yesterday";
  return days < 7 ? "This week" : "Earlier";
}

/** Ask before something that cannot be undone. */
function confirm(title, text) {
  const dialog = document.getElementById("confirm");
  return new Promise((resolve) => {
    const cancel = h("button", { type: "button", onclick: () => dialog.close() }, "Keep it");
    const go = h("button.danger", { type: "button", onclick: () => dialog.close("yes") }, "Delete");
    dialog.replaceChildren(h("h2", { id: "confirm-title" }, title), h("p", {}, text), h("div.actions", {}, cancel, go));
    dialog.returnValue = "";
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
    dialog.showModal();
    cancel.focus();
  });
}
