// A conversation by the AI SDK (npm: ai, @ai-sdk/openai-compatible, zod); prints JSON as client_scripts.py does.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [, , url, modules] = process.argv;
const require = createRequire(modules + "/node_modules/");
const load = async (name) => import(pathToFileURL(require.resolve(name)).href);
const { generateText, streamText, tool } = await load("ai");
const { createOpenAICompatible } = await load("@ai-sdk/openai-compatible");
const { z } = await load("zod");

const provider = createOpenAICompatible({ name: "ours", baseURL: url, apiKey: "none" });
const model = provider.chatModel("tiny");
const prompt = "What is the weather in Rome?";
const how = { model, prompt, maxOutputTokens: 60, temperature: 0, seed: 1, maxRetries: 0 };
const weather = tool({ description: "Tells the weather.", inputSchema: z.object({ city: z.enum(["Rome", "Oslo"]) }) });
const forced = { tools: { weather }, toolChoice: { type: "tool", toolName: "weather" } };

const plain = await generateText(how);
let streamed = "";
for await (const part of streamText(how).textStream) streamed += part;
const called = await generateText({ ...how, ...forced });
const again = await streamText({ ...how, ...forced }).toolCalls;
const shown = (calls) => calls.map((call) => [call.toolName, call.input]);
console.log(
  JSON.stringify({
    plain: plain.text,
    streamed,
    called: shown(called.toolCalls),
    "called in a stream": shown(again),
  }),
);
