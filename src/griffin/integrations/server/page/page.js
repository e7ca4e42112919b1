// The form, and what it starts.

import { Answer, Comparison } from "./answer.js";
import { forget, show } from "./picture.js";
import { Failure, keepKey, request } from "./server.js";

const at = (id) => document.getElementById(id);
const percent = (density) => `${Math.round(density * 100)}% of the FF neurons`;
const layerText = () => `${at("layer").value} (0 to ${at("layer").max})`;
const full = new Answer(at("full"), soon), griffin = new Answer(at("griffin"), soon);
const comparison = new Comparison(full, griffin);
let model = null;
let asked = null;  // what the answers and the picture are of
let running = null;  // the AbortController of the answers
let drawing = null;  // the AbortController of another layer's picture
let scheduled = 0;

function soon() {
  scheduled ||= requestAnimationFrame(render);
}

function render() {
  cancelAnimationFrame(scheduled);
  scheduled = 0;
  full.show();
  griffin.show();
  comparison.update();
  const byChance = asked.temperature > 0 ? "; above temperature 0 answers also differ by chance" : "";
  at("difference").hidden = !griffin.ended && comparison.compared === 0;
  at("difference").textContent = comparison.line() + byChance;
  const ratio = asked.order === "turns" && griffin.served && full.speed() ? griffin.speed() / full.speed() : null;
  at("ratio").textContent = ratio ? `${ratio.toFixed(2)} times the full model's speed` : "";
  at("ratio").classList.toggle("faster", ratio > 1);
}

function settle() {
  const temperature = Number(at("temperature").value);
  const spoken = { density: percent(at("density").value), temperature: temperature ? temperature.toFixed(1) : "0, greedy" };
  for (const [id, text] of Object.entries(spoken)) {
    at(`${id}-shown`).textContent = text;
    at(id).setAttribute("aria-valuetext", text);
  }
  at("sharing").hidden = at("order").value !== "together";
  if (!asked) at("share").textContent = spoken.density;
}

function say(text) {
  at("status").textContent = text;
}

function fail(error) {
  const known = error instanceof Failure;
  at("error").textContent = known ? error.message : `The page could not read the server's answer: ${error.message}`;
  say("");
  if (error.status !== 401) return;
  at("key").hidden = false;
  at("secret").focus();
}

function busy(controller) {
  const [off, on] = controller ? [at("generate"), at("stop")] : [at("stop"), at("generate")];
  const focused = document.activeElement === off;
  running = controller;
  on.disabled = false;
  if (focused) on.focus();
  off.disabled = true;
  at("layer").disabled = Boolean(controller);
}

function read() {
  const content = at("prompt").value, chat = document.querySelector('input[value="chat"]').checked;
  return {
    chat,
    prompt: { model: model.id, ...(chat ? { messages: [{ role: "user", content }] } : { prompt: content }) },
    order: at("order").value,
    density: Number(at("density").value),
    length: Number(at("length").value),
    temperature: Number(at("temperature").value),
  };
}

async function generate() {
  if (!model) await start();
  if (!model || running) return;
  const own = new AbortController();
  drawing?.abort();
  asked = read();
  busy(own);
  at("error").textContent = "";
  at("share").textContent = percent(asked.density);
  for (const part of [full, griffin, comparison]) part.clear();
  forget();
  render();
  try {
    await answers(own.signal);
    say("Drawing the picture");
    await draw(own.signal);
    say("Done");
  } catch (error) {
    own.abort();
    if (error.name === "AbortError") say("Stopped");
    else fail(error);
  }
  busy(null);
}

async function answers(signal) {
  if (asked.order === "together") {
    say("Both answer");
    await Promise.all([full.stream(asked, 1, signal), griffin.stream(asked, asked.density, signal)]);
  } else {
    say("The full model answers");
    await full.stream(asked, 1, signal);
    say("GRIFFIN answers");
    await griffin.stream(asked, asked.density, signal);
  }
  render();
}

async function draw(signal) {
  const body = { ...asked.prompt, layer: Number(at("layer").value), griffin: { density: asked.density } };
  show(await (await request("v1/griffin/flocking", body, signal)).json());
}

async function redraw() {
  at("layer-shown").textContent = layerText();
  drawing?.abort();
  const own = (drawing = new AbortController());
  await new Promise((later) => setTimeout(later, 120));  // the slider may still be moving
  if (own.signal.aborted) return;
  at("error").textContent = "";
  await draw(own.signal).catch((error) => error.name === "AbortError" || fail(error));
}

async function start() {
  try {
    model = (await (await request("v1/models")).json()).data[0];
    const { layers, context_length: context, chat } = model.griffin;
    at("model").textContent = `${model.id}: the full model and its own prompt-selected experts, side by side.`;
    at("length").max = context;
    at("layer").max = layers - 1;
    at("layer").value = Math.floor(layers / 3);
    at("layer-shown").textContent = layerText();
    document.querySelector('input[value="chat"]').disabled = !chat;
    if (!chat) document.querySelector('input[value="text"]').checked = true;
    at("error").textContent = "";
  } catch (error) {
    at("model").textContent = "No model yet";
    fail(error);
  }
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
at("ask").addEventListener("input", settle);
at("stop").addEventListener("click", () => running.abort());
addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !running) at("ask").requestSubmit();
});
for (const button of document.querySelectorAll(".examples button")) {
  button.addEventListener("click", () => {
    at("prompt").value = button.textContent;
    at("prompt").focus();
  });
}
at("key").addEventListener("submit", (event) => {
  event.preventDefault();
  keepKey(at("secret").value);
  at("secret").value = "";
  at("key").hidden = true;
  at("prompt").focus();
  start();
});
at("layer").addEventListener("input", redraw);

settle();
start();
