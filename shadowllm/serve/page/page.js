// The page: a chat, its speed, and a picture of what each token computed in full. Text is only put into text nodes.

const find = (id) => document.getElementById(id);
const SHARES = [null, 0.75, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02]; // of neurons and heads; null is everything
const state = { model: null, sizes: null, messages: [], tokens: [], chosen: -1, stop: null, last: null };

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function say(text, error = false) {
  find("status").textContent = text;
  find("status").classList.toggle("error", error);
}

function headers() {
  const key = find("key").value.trim();
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

const percent = (share) => `${Math.round(100 * share)}%`;

function share() {
  return SHARES[Number(find("budget").value)];
}

// With the selector relu, the ReLU decides which neurons are computed, so a budget has only heads.
const choosesNeurons = () => state.sizes?.selector !== "relu";

function budget() {
  if (share() === null) return "exact";
  return choosesNeurons() ? { neurons: share(), heads: share() } : { heads: share() };
}

function showBudget() {
  const units = choosesNeurons() ? "neurons and heads" : "heads, and all neurons that fire";
  const text = share() === null ? "everything (exact)" : `${percent(share())} of ${units}`;
  find("budget-text").textContent = text;
  find("budget").setAttribute("aria-valuetext", text);
}

// --- requests ---

async function failure(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `the server answered ${answer.status}`;
  }
}

async function* events(body, signal) {
  const path = state.sizes.chat ? "/v1/chat/completions" : "/v1/completions";
  const answer = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
  if (!answer.ok) throw new Error(await failure(answer));
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let buffer = ""; ; ) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the connection ended early");
    const parts = (buffer + value).split("\n\n");
    buffer = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

function request(sparsity) {
  const { messages } = state.last;
  const prompt = state.sizes.chat ? { messages } : { prompt: messages[messages.length - 1].content };
  return {
    ...prompt, model: state.model, max_tokens: state.last.length, stream: true, sparsity, shadowllm: { selection: true },
  };
}

// Streams an answer into a message, and into `answer`: its text, its tokens, and the tokens per second after the first
// one. If it is stopped or fails, `answer` has what came until then.
async function generate(sparsity, message, answer) {
  let first = 0;
  state.stop = new AbortController();
  for await (const event of events(request(sparsity), state.stop.signal)) {
    const choice = event.choices[0];
    answer.text += (choice.delta ? choice.delta.content : choice.text) ?? "";
    message.textContent = answer.text;
    if (event.shadowllm) {
      const now = performance.now();
      first ||= now;
      answer.tokens.push({ text: event.shadowllm.token, selection: event.shadowllm.selection });
      if (answer.tokens.length > 1) answer.speed = (1000 * (answer.tokens.length - 1)) / (now - first);
    }
  }
}

const noAnswer = () => ({ text: "", tokens: [], speed: null });

function addMessage(kind, title) {
  const item = element("li", "", { class: kind });
  const text = element("p", "");
  item.append(element("h3", title), text);
  find("messages").append(item);
  return text;
}

const speedText = (speed) => (speed ? `${speed.toFixed(1)} tokens per second` : "too short to measure");

const stopped = (error) => error.name === "AbortError";

async function work(action) {
  const buttons = ["send", "compare", "clear"].map(find);
  buttons.forEach((button) => { button.disabled = true; });
  find("stop").disabled = false;
  say("Working");
  try {
    await action();
  } catch (error) {
    say(stopped(error) ? "Stopped" : `Error: ${error.message}`, !stopped(error));
  } finally {
    buttons.forEach((button) => { button.disabled = false; });
    find("compare").disabled = state.last === null;
    find("stop").disabled = true;
  }
}

// The next request sends what is shown: a stopped answer as far as it came, and nothing of one that failed.
async function send() {
  const content = find("prompt").value, before = state.last, answer = noAnswer();
  const asked = addMessage("user", "You"), answered = addMessage("assistant", `Model, ${find("budget-text").textContent}`);
  asked.textContent = content;
  find("prompt").value = "";
  state.last = {
    messages: [...state.messages, { role: "user", content }], length: Number(find("length").value),
  };
  showTokens([]);
  find("speed").textContent = find("dense-speed").textContent = "not measured";
  try {
    await generate(budget(), answered, answer);
  } catch (error) {
    if (stopped(error)) {
      keep(answer);
    } else {
      [asked, answered].forEach((text) => text.parentElement.remove());
      state.last = before;
      find("prompt").value = [content, find("prompt").value].filter(Boolean).join("\n"); // with what was typed meanwhile
    }
    throw error;
  }
  keep(answer);
  say(`The answer is complete: ${answer.tokens.length} tokens, ${speedText(answer.speed)}.`);
}

function keep(answer) {
  state.messages = [...state.last.messages, { role: "assistant", content: answer.text }];
  find("speed").textContent = speedText(answer.speed);
  showTokens(answer.tokens);
}

async function compare() {
  const answer = noAnswer(), answered = addMessage("dense", "Dense model, the same prompt");
  try {
    await generate("exact", answered, answer);
  } catch (error) {
    if (!stopped(error)) answered.parentElement.remove();
    throw error;
  }
  find("dense-speed").textContent = speedText(answer.speed);
  say(`The dense answer is complete: ${answer.tokens.length} tokens, ${speedText(answer.speed)}.`);
}

// --- tokens ---

function showTokens(tokens) {
  state.tokens = tokens;
  find("tokens").replaceChildren(...tokens.map((token, index) => {
    const option = element("span", token.text, { role: "option", id: `token-${index}`, "aria-selected": "false" });
    if (!token.text.trim()) option.setAttribute("aria-label", token.text.includes("\n") ? "new line" : "space");
    option.addEventListener("click", () => choose(index));
    return option;
  }));
  find("tokens").removeAttribute("aria-activedescendant");
  state.chosen = -1;
  choose(Math.min(1, tokens.length - 1)); // the first token comes from the prompt, which is dense
}

function choose(index) {
  find(`token-${state.chosen}`)?.setAttribute("aria-selected", "false");
  state.chosen = index;
  const option = find(`token-${index}`);
  if (option) {
    option.setAttribute("aria-selected", "true");
    option.scrollIntoView({ block: "nearest" });
    find("tokens").setAttribute("aria-activedescendant", option.id);
  }
  showSelection();
}

function move(event) {
  const last = state.tokens.length - 1;
  const { chosen } = state;
  const target = {
    ArrowRight: chosen + 1, ArrowDown: chosen + 1, ArrowLeft: chosen - 1, ArrowUp: chosen - 1, Home: 0, End: last,
  }[event.key];
  if (target === undefined || last < 0) return;
  event.preventDefault();
  choose(Math.max(0, Math.min(last, target)));
}

// --- the picture ---

// One row per layer: the share of each head and each group of neurons that was computed in full, from 0 to 1.
function layers(selection) {
  const { layers: count, dense_layers: dense, heads, neurons } = state.sizes;
  const groups = Math.min(64, neurons);
  return Array.from({ length: count }, (_, layer) => {
    const row = layer - dense;
    if (row < 0 || selection === null) {
      return { heads: Array(heads).fill(1), bins: Array(groups).fill(1), neurons };
    }
    return {
      heads: [...selection.heads[row]].map(Number),
      bins: [...selection.bins[row]].map((digit) => parseInt(digit, 16) / 15),
      neurons: selection.neurons[row],
    };
  });
}

const sum = (values) => values.reduce((total, value) => total + value, 0);

function showSelection() {
  const token = state.tokens[state.chosen];
  if (!state.sizes) return;
  if (!token) {
    find("summary").textContent = "No token is chosen.";
    find("table").replaceChildren();
    draw([]);
    return;
  }
  const rows = layers(token.selection), { heads, neurons } = state.sizes;
  const share = (value, most) => percent(value / (most * rows.length));
  find("summary").textContent = `Token ${state.chosen + 1} of ${state.tokens.length}, “${token.text}”: ` +
    (token.selection === null ? "a dense step, everything in full." :
      `${share(sum(rows.map((row) => sum(row.heads))), heads)} of the heads and ` +
      `${share(sum(rows.map((row) => row.neurons)), neurons)} of the neurons in full.`);
  find("table").replaceChildren(...rows.map((row, layer) => {
    const line = document.createElement("tr");
    line.append(element("th", String(layer), { scope: "row" }), element("td", `${sum(row.heads)} of ${heads}`),
      element("td", `${row.neurons} of ${neurons}`));
    return line;
  }));
  draw(rows);
}

function draw(rows) {
  const canvas = find("picture"), ratio = window.devicePixelRatio || 1, height = Math.max(4, Math.min(14, 360 / rows.length));
  canvas.style.height = `${Math.max(60, height * rows.length)}px`;
  canvas.width = canvas.clientWidth * ratio;
  canvas.height = canvas.clientHeight * ratio;
  const pen = canvas.getContext("2d"), style = getComputedStyle(canvas);
  const [full, rest] = ["--full", "--rest"].map((name) => style.getPropertyValue(name).trim());
  pen.scale(ratio, ratio);
  const heads = rows.length ? rows[0].heads.length : 1, width = canvas.clientWidth, left = width * 0.3;
  const cell = (x, y, w, value) => {
    pen.globalAlpha = 1;
    pen.fillStyle = rest;
    pen.fillRect(x, y, Math.max(w - 1, 0.5), height - 1);
    pen.globalAlpha = value;
    pen.fillStyle = full;
    pen.fillRect(x, y, Math.max(w - 1, 0.5), height - 1);
  };
  rows.forEach((row, layer) => {
    row.heads.forEach((value, head) => cell((left / heads) * head, layer * height, left / heads, value));
    const start = left + 8, step = (width - start) / row.bins.length;
    row.bins.forEach((value, bin) => cell(start + step * bin, layer * height, step, value));
  });
}

// --- start ---

async function start() {
  const answer = await fetch("/v1/models", { headers: headers() });
  if (!answer.ok) throw new Error(await failure(answer));
  const [model] = (await answer.json()).data;
  state.model = model.id;
  state.sizes = model.shadowllm;
  const { layers: count, heads, neurons, rest, max_tokens: most } = model.shadowllm;
  find("model").textContent = `${model.id}: ${count} layers, each with ${heads} heads and ${neurons} neurons`;
  find("rest").textContent = rest === "shadow" ? "from the low-bit copy" : "left out";
  find("length").max = most;
  showBudget();
  showSelection();
}

find("form").addEventListener("submit", (event) => {
  event.preventDefault();
  work(async () => {
    if (!state.sizes) await start();
    await send();
  });
});
find("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!find("send").disabled) find("form").requestSubmit();
  }
});
find("budget").addEventListener("input", showBudget);
find("stop").addEventListener("click", () => state.stop?.abort());
find("compare").addEventListener("click", () => work(compare));
find("clear").addEventListener("click", () => {
  state.messages = [];
  state.last = null;
  find("messages").replaceChildren();
  find("compare").disabled = true;
  showTokens([]);
  say("");
  find("prompt").focus();
});
find("tokens").addEventListener("keydown", move);
window.addEventListener("resize", showSelection);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showSelection);
showBudget();
start().catch((error) => say(`Error: ${error.message}`, true));
