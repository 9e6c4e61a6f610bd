// A client made by openapi-typescript and openapi-fetch: prints what it was told.

import createClient from "openapi-fetch";
import type { components, paths } from "./schema.js";

declare const process: { argv: string[] };
type Event = components["schemas"]["Event"];

const { url, token } = JSON.parse(process.argv[2]!) as { url: string; token: string };
const client = createClient<paths>({ baseUrl: url, headers: { Authorization: `Bearer ${token}` } });
const path = { sid: "typescript" };

function some<T>(data: T | undefined, error?: unknown): T {
  if (data === undefined) throw new Error(JSON.stringify(error));
  return data;
}

/** A turn that is started with what is required, and nothing else; its events, to its end. */
async function turn(message: string, onEvent: (event: Event) => Promise<void> | void): Promise<Event> {
  const { data, error } = await client.POST("/chat/{sid}", {
    params: { path, query: { stream: 0 } },
    body: { message },
  });
  const started = some(data, error);
  if (!("events_url" in started)) throw new Error("it has not even begun");
  for (let cursor = started.cursor; ; ) {
    const answer = await client.GET("/chat/{sid}/events", { params: { path, query: { after: cursor, wait: 25 } } });
    const page = some(answer.data, answer.error);
    if (!("events" in page)) throw new Error("no page");
    for (const event of page.events) {
      await onEvent(event);
      if (event.type === "done" || event.type === "error") return event;
    }
    cursor = page.cursor;
  }
}

const text: unknown[] = [];
const counted = await turn("count to 3", (event) => {
  if (event.type === "llm_text") text.push(event.data.chunk);
});

const written = await turn("write plan.txt: Ship it.", async (event) => {
  if (event.type !== "tool_confirmation") return;
  const body = { question_id: String(event.data.question_id), approve: true, remember: "turn" as const };
  some((await client.POST("/chat/{sid}/answer", { params: { path }, body })).data);
});

const waited = await client.POST("/chat/{sid}", {
  params: { path, query: { stream: 0 }, header: { Prefer: "wait=50", "Idempotency-Key": "a-key" } },
  body: { message: "say so", on_busy: "queue", images: [] },
});
const result = some(waited.data, waited.error);

const streamed = await client.POST("/chat/{sid}", {
  params: { path, query: { stream: 1 } },
  body: { message: "say on" },
  parseAs: "text",
});

const refused = await client.POST("/chat/{sid}", { params: { path, query: { stream: 0 } }, body: { message: " " } });
const messages = some((await client.GET("/session/{sid}/messages", { params: { path } })).data);

console.log(
  JSON.stringify({
    counted: counted.reply,
    text: text.join(""),
    written: counted.turn_id !== written.turn_id && written.data.status,
    waited: "reply" in result && result.reply,
    streamed: streamed.data,
    refused: refused.error?.code,
    contents: messages.messages.map((message) => message.content ?? message.tool),
  }),
);
