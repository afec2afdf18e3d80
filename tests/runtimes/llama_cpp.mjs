// llama.cpp, as npm's node-llama-cpp brings it: asked one thing in JSON on standard input; the answer goes to a file.
//
// In:  {model, answer: path, texts: [string], windows: [[id]], logits: boolean, generate: {ids, count}}
// Out: {version, tokens: [[id]], adds_bos, losses: [[nats of each token but the first]], logits: [[[number]]], generated}
import path from "node:path";
import fs from "node:fs";
import {pathToFileURL} from "node:url";

const home = path.join(process.env.COMPRESSOR_LLAMA_CPP, "node-llama-cpp");
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(path.join(home, "dist", "index.js")).href);
const asked = JSON.parse(fs.readFileSync(0, "utf8"));

const llama = await getLlama({
    gpu: false, build: "never", skipDownload: true, progressLogs: false, maxThreads: 1, logLevel: LlamaLogLevel.error,
});
const model = await llama.loadModel({modelPath: asked.model});
const windows = asked.windows ?? [];
const longest = Math.max(64, ...windows.map((ids) => ids.length + 1));
const context = await model.createContext({contextSize: longest, batchSize: longest});
const sequence = context.getSequence();

async function evaluate(ids) {
    await sequence.clearHistory();
    const results = await sequence.controlledEvaluate(ids.map((id) => [id, {generateNext: {logits: true}}]));
    return results.map(({next}) => Float64Array.from({length: next.logits.size}, (_, id) => next.logits.get(id)));
}

const losses = [], logits = [];
for (const ids of windows) {
    const found = await evaluate(ids);
    losses.push(ids.slice(1).map((id, i) => {
        const most = found[i].reduce((one, other) => Math.max(one, other));
        return most + Math.log(found[i].reduce((sum, value) => sum + Math.exp(value - most), 0)) - found[i][id];
    }));
    if (asked.logits)
        logits.push(found.map((values) => Array.from(values)));
}

const generated = [];
if (asked.generate) {
    await sequence.clearHistory();
    for await (const id of sequence.evaluate(asked.generate.ids, {temperature: 0})) {
        generated.push(id);
        if (generated.length === asked.generate.count) break;
    }
}

const version = JSON.parse(fs.readFileSync(path.join(home, "package.json"), "utf8")).version;
fs.writeFileSync(asked.answer, JSON.stringify({
    version: `node-llama-cpp ${version}, llama.cpp ${llama.llamaCppRelease.release}`,
    tokens: (asked.texts ?? []).map((text) => model.tokenize(text, true)),
    adds_bos: model.tokens.shouldPrependBosToken,
    losses, logits, generated,
}));
await llama.dispose();
process.exit(0);
