// The Vercel AI SDK, by its provider for servers like OpenAI's.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, jsonSchema, streamText, tool, Output } from "ai";
import { BASE_URL, CAPITAL, KEY, MODEL, PERSON, TOOL_MODEL, WEATHER, check, run } from "./probe.mjs";

const provider = createOpenAICompatible({
  name: "aegaeon",
  baseURL: `${BASE_URL}/v1`,
  apiKey: KEY,
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const model = provider(MODEL);
const greedy = { model, prompt: CAPITAL, maxOutputTokens: 24, temperature: 0, maxRetries: 0 };
const tools = { get_weather: tool({ description: "weather", inputSchema: jsonSchema(WEATHER) }) };
const calling = {
  model: provider(TOOL_MODEL),
  prompt: CAPITAL,
  maxOutputTokens: 200,
  maxRetries: 0,
  tools,
};

await run({
  chat: async () => {
    const { text, usage } = await generateText(greedy);
    check(text.includes("Paris") && usage.outputTokens > 4, { text, usage });
  },
  "chat, streamed": async () => {
    const told = streamText(greedy);
    let text = "";
    for await (const part of told.textStream) text += part;
    check(text.includes("Paris"), text);
    check((await told.finishReason) === "stop", await told.finishReason);
  },
  "usage of a stream": async () => {
    const told = streamText({ ...greedy, maxOutputTokens: 4 });
    await told.consumeStream();
    check((await told.usage).outputTokens === 4, await told.usage);
  },
  "text completion, streamed too": async () => {
    const asked = { ...greedy, model: provider.completionModel(MODEL), maxOutputTokens: 8 };
    const whole = (await generateText(asked)).text;
    let text = "";
    for await (const part of streamText(asked).textStream) text += part;
    check(text && text === whole, [text, whole]);
  },
  stop: async () => {
    const { text, finishReason } = await generateText({ ...greedy, stopSequences: ["Paris"] });
    check(!text.includes("Paris") && finishReason === "stop", text);
  },
  "a required tool call": async () => {
    const { toolCalls } = await generateText({ ...calling, toolChoice: "required" });
    check("city" in toolCalls[0].input, toolCalls);
  },
  "a named tool call, streamed": async () => {
    const toolChoice = { type: "tool", toolName: "get_weather" };
    const told = streamText({ ...calling, toolChoice });
    await told.consumeStream();
    check("unit" in (await told.toolCalls)[0].input, await told.toolCalls);
  },
  "JSON of a schema": async () => {
    const output = Output.object({ schema: jsonSchema(PERSON) });
    const told = await generateText({ ...greedy, maxOutputTokens: 200, output });
    check("age" in told.output, told.output);
  },
  "errors as the client's classes": async () => {
    const asked = { ...greedy, model: provider("none") };
    const error = await generateText(asked).catch((caught) => caught);
    check(error.statusCode === 404 && error.message.includes("none"), error);
  },
  "asynchronous, ended early": async () => {
    const stopping = new AbortController();
    const told = streamText({ ...greedy, maxOutputTokens: 400, abortSignal: stopping.signal });
    let count = 0;
    try {
      for await (const _ of told.textStream) if (++count === 3) stopping.abort();
    } catch (error) {
      check(error.name === "AbortError", error);
    }
    check(count >= 3, count);
  },
});
