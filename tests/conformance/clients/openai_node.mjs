// openai-node: the whole answers, the streams and their helpers.
import OpenAI from "openai";
import { BASE_URL, KEY, MODEL, PERSON, QUESTION, TOOL_MODEL, WEATHER, check, run } from "./probe.mjs";

const client = new OpenAI({ baseURL: `${BASE_URL}/v1`, apiKey: KEY, maxRetries: 0 });
const chat = client.chat.completions;
const greedy = { model: MODEL, messages: QUESTION, max_tokens: 24, temperature: 0 };
const tools = [{ type: "function", function: { name: "get_weather", parameters: WEATHER } }];

await run({
  "list models, one model": async () => {
    const ids = [];
    for await (const model of client.models.list()) ids.push(model.id);
    check(ids.includes(MODEL) && (await client.models.retrieve(MODEL)).id === MODEL, ids);
  },
  chat: async () => {
    const answer = await chat.create(greedy);
    check(answer.choices[0].message.content.includes("Paris"), answer);
  },
  "chat, streamed": async () => {
    const stream = chat.stream(greedy);
    const text = await stream.finalContent();
    check(text.includes("Paris"), text);
  },
  "usage of a stream": async () => {
    const asked = { ...greedy, max_tokens: 4, stream: true, stream_options: { include_usage: true } };
    let usage;
    for await (const chunk of await chat.create(asked)) usage = chunk.usage ?? usage;
    check(usage?.completion_tokens === 4, usage);
  },
  "text completion, streamed too": async () => {
    const asked = { model: MODEL, prompt: "Once upon a time", max_tokens: 8, temperature: 0 };
    const whole = (await client.completions.create(asked)).choices[0].text;
    let text = "";
    for await (const part of await client.completions.create({ ...asked, stream: true }))
      text += part.choices[0].text;
    check(text === whole && text, [text, whole]);
  },
  n: async () => {
    const answer = await chat.create({ ...greedy, n: 2 });
    check(answer.choices.length === 2, answer);
  },
  "logprobs, of chat": async () => {
    const answer = await chat.create({ ...greedy, max_tokens: 3, logprobs: true, top_logprobs: 2 });
    check(answer.choices[0].logprobs.content.length === 3, answer);
  },
  "a required tool call": async () => {
    const asked = { model: TOOL_MODEL, messages: QUESTION, max_tokens: 200 };
    const answer = await chat.create({ ...asked, tools, tool_choice: "required" });
    const call = answer.choices[0].message.tool_calls[0];
    check("city" in JSON.parse(call.function.arguments), call);
  },
  "a named tool call, streamed": async () => {
    const stream = chat.stream({
      model: TOOL_MODEL,
      messages: QUESTION,
      max_tokens: 200,
      tools,
      tool_choice: { type: "function", function: { name: "get_weather" } },
    });
    const call = (await stream.finalMessage()).tool_calls[0];
    check("unit" in JSON.parse(call.function.arguments), call);
  },
  "JSON of a schema": async () => {
    const answer = await chat.create({
      ...greedy,
      max_tokens: 200,
      response_format: { type: "json_schema", json_schema: { name: "p", schema: PERSON, strict: true } },
    });
    check("age" in JSON.parse(answer.choices[0].message.content), answer);
  },
  "errors as the client's classes": async () => {
    const error = await chat.create({ ...greedy, model: "none" }).catch((caught) => caught);
    check(error instanceof OpenAI.NotFoundError && error.code === "model_not_found", error);
    const wrong = await chat.create({ ...greedy, temperature: 3 }).catch((caught) => caught);
    check(wrong instanceof OpenAI.BadRequestError, wrong);
  },
  "a wrong key": async () => {
    const other = new OpenAI({ baseURL: `${BASE_URL}/v1`, apiKey: "wrong", maxRetries: 0 });
    const error = await other.models.list().catch((caught) => caught);
    check(error instanceof OpenAI.AuthenticationError, error);
  },
  "asynchronous, ended early": async () => {
    const stream = await chat.create({ ...greedy, max_tokens: 400, stream: true });
    let count = 0;
    for await (const _ of stream) if (++count === 3) stream.controller.abort();
    check(count >= 3, count);
  },
});
