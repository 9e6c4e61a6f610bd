// Reads turns with @microsoft/fetch-event-source, as other people's pages do, and prints
// what it was given. Takes a list of {url, headers, body} as its only argument.

import { fetchEventSource } from "@microsoft/fetch-event-source";

// The package is made for browsers: a page that is visible, and may be hidden.
globalThis.window = globalThis;
globalThis.document = Object.assign(new EventTarget(), { hidden: false });

const asked = JSON.parse(process.argv[2]);

async function read({ url, headers, body, hide }) {
  const seen = { messages: [], opened: 0, refused: null };
  await fetchEventSource(url, {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers },
    body: JSON.stringify(body),
    openWhenHidden: !hide,
    async onopen(response) {
      seen.opened++;
      if (response.status >= 400) {
        seen.refused = { status: response.status, ...(await response.json()) };
        throw new Refused();
      }
    },
    onmessage({ id, data }) {
      seen.messages.push({ id, data });
      if (seen.messages.length === hide) void lookAway();
    },
    onerror(error) {
      if (error instanceof Refused) throw error;
      return 50;
    },
  }).catch((error) => {
    if (!(error instanceof Refused)) throw error;
  });
  return seen;
}

class Refused extends Error {}

/** Another tab, and back: not before the package has noticed that its own request has ended. */
async function lookAway() {
  for (const hidden of [true, false]) {
    await new Promise((resolve) => setTimeout(resolve, 100));
    document.hidden = hidden;
    document.dispatchEvent(new Event("visibilitychange"));
  }
}

console.log(JSON.stringify(await Promise.all(asked.map(read))));
process.exit(0);
