// What the scripts of Node clients share: as probe.py.
export const BASE_URL = process.env.CONFORMANCE_URL;
export const KEY = process.env.CONFORMANCE_KEY;
export const MODEL = process.env.CONFORMANCE_MODEL;
export const TOOL_MODEL = process.env.CONFORMANCE_TOOL_MODEL;

export const CAPITAL = "What is the capital of France?";
export const QUESTION = [{ role: "user", content: CAPITAL }];
export const WEATHER = {
  type: "object",
  properties: {
    city: { type: "string", maxLength: 12 },
    unit: { type: "string", enum: ["celsius", "fahrenheit"] },
  },
  required: ["city", "unit"],
  additionalProperties: false,
};
export const PERSON = {
  type: "object",
  properties: { name: { type: "string", maxLength: 12 }, age: { type: "integer" } },
  required: ["name", "age"],
  additionalProperties: false,
};

export function check(condition, told) {
  if (!condition) throw new Error(`not as it should be: ${JSON.stringify(told)}`);
}

export async function run(features) {
  for (const [feature, call] of Object.entries(features)) {
    const began = performance.now();
    let note = "";
    try {
      await call();
    } catch (error) {
      console.error(error);
      note = `${error.name}: ${error.message}`.split("\n")[0].slice(0, 300) || "failed";
    }
    const took_s = Math.round(performance.now() - began) / 1000;
    console.log(JSON.stringify({ feature, ok: !note, note, took_s }));
  }
}
