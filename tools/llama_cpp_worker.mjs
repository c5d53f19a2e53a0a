// What tools.decoding runs with node for llama.cpp: one GGUF file, on the CPU. The first line that
// it reads is answered with what there is to know, each further one with a sample in CPU seconds,
// as tools/decoding_work.py does.
//
// node llama_cpp_worker.mjs FOLDER FILE PROMPT_TOKENS TOKENS THREADS
// FOLDER has node_modules/node-llama-cpp.

import {readFileSync, statSync} from "node:fs";
import {join, resolve} from "node:path";
import {createInterface} from "node:readline";
import {pathToFileURL} from "node:url";

const [folder, file] = process.argv.slice(2, 4);
const [promptTokens, tokens, threads] = process.argv.slice(4).map(Number);
const home = join(resolve(folder), "node_modules", "node-llama-cpp");
const {getLlama} = await import(pathToFileURL(join(home, "dist", "index.js")));
const {version} = JSON.parse(readFileSync(join(home, "package.json"), "utf8"));

// Its messages would stand among the answers.
const llama = await getLlama({gpu: false, build: "never", logger: () => {}});
const model = await llama.loadModel({modelPath: file});
const context = await model.createContext({contextSize: promptTokens + tokens + 1, threads});
const sequence = context.getSequence();
const prompt = Array.from({length: promptTokens}, (_, i) => 1 + (i * 37) % 89);

function cpuSeconds() {
    const {user, system} = process.cpuUsage(); // microseconds of all threads
    return (user + system) / 1e6;
}

async function sample() {
    await sequence.clearHistory();
    const marks = [cpuSeconds()];
    // The likeliest token each time, and none ends the text.
    for await (const _ of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
        marks.push(cpuSeconds());
        if (marks.length === 1 + tokens) break;
    }
    return {
        prefill_s: marks[1] - marks[0],
        token_s: (marks[tokens] - marks[1]) / (tokens - 1)
    };
}

let isFirst = true;
for await (const _ of createInterface({input: process.stdin})) {
    const about = {weight_bytes: statSync(file).size, "node-llama-cpp": version};
    console.log(JSON.stringify(isFirst ? about : await sample()));
    isFirst = false;
}
process.exit(0);
