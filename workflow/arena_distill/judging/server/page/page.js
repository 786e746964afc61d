"use strict";
// Every text enters the page as text (textContent, value), never as HTML. The only requests are to this server.

const FIELDS = { prompt: "Prompt", response_a: "Answer A", response_b: "Answer B" };
const PARTS = { prompt: "the prompt", response_a: "answer A", response_b: "answer B" };
const NAMES = { model_a: "A wins", model_b: "B wins", tie: "Tie" };
const LIKELIEST = { model_a: "people prefer answer A", model_b: "people prefer answer B", tie: "a tie" };
const ORDERS = { AB: "A first, then B", BA: "B first, then A" };
const at = (id) => document.getElementById(id);
const percent = (share) => `${(100 * share).toFixed(1)}\u202f%`;
let token = "";
let about = { kind: "joint", examples: [] };

function made(tag, text, name) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (name) element.className = name;
  return element;
}

async function request(path, body) {
  const headers = { "content-type": "application/json" };
  if (token) headers.authorization = `Bearer ${token}`;
  const response = await fetch(path, body ? { method: "POST", headers, body: JSON.stringify(body) } : { headers });
  const answer = await response.json().catch(() => ({}));
  if (response.ok) return answer;
  if (response.status === 401) at("token-form").hidden = false;
  throw new Error(answer.error ? answer.error.message : `The server answered with status ${response.status}.`);
}

// --- the battle ---

function addRound(turn = {}) {
  const round = at("round").content.cloneNode(true).firstElementChild;
  for (const name of Object.keys(FIELDS)) {
    round.querySelector(`[name=${name}]`).value = turn[name] || "";
  }
  round.querySelector(".remove").addEventListener("click", () => { round.remove(); number(); });
  at("rounds").append(round);
  number();
}

function number() {
  const rounds = [...at("rounds").children];
  rounds.forEach((round, i) => {
    round.querySelector("legend").textContent = rounds.length > 1 ? `Turn ${i + 1}` : "Battle";
    round.querySelector(".remove").hidden = rounds.length === 1;
  });
}

function turns(name) {
  return [...document.querySelectorAll(`#rounds [name=${name}]`)].map((area) => area.value);
}

function show(battle) {
  at("rounds").replaceChildren();
  const count = Math.max(1, ...Object.keys(FIELDS).map((name) => battle[name].length));
  for (let i = 0; i < count; i++) {
    addRound(Object.fromEntries(Object.keys(FIELDS).map((name) => [name, battle[name][i]])));
  }
  at("result").hidden = true;
  at("error").hidden = true;
}

// --- the verdict ---

function bar(name, share) {
  const row = made("div");
  const room = made("div", undefined, "bar");
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const rectangle = document.createElementNS("http://www.w3.org/2000/svg", "rect");
  rectangle.setAttribute("width", `${100 * share}%`);
  rectangle.setAttribute("height", "100%");
  rectangle.setAttribute("class", name);
  svg.setAttribute("aria-hidden", "true");
  svg.append(rectangle);
  room.append(svg);
  row.append(made("dt", NAMES[name]), room, made("dd", percent(share)));
  return row;
}

function likeliest(probabilities) {
  return Object.entries(probabilities).reduce((best, next) => (next[1] > best[1] ? next : best))[0];
}

function showOrders(orders, classes) {
  const head = made("tr");
  head.append(made("th", "The judge sees"), ...classes.map((name) => made("th", NAMES[name])));
  const rows = Object.entries(orders).map(([order, probabilities]) => {
    const row = made("tr");
    row.append(made("th", ORDERS[order]), ...classes.map((name) => made("td", percent(probabilities[name]))));
    return row;
  });
  at("orders").replaceChildren(head, ...rows);
  const said = new Set(Object.values(orders).map(likeliest));
  at("order-note").textContent = about.kind === "pointwise"
    ? "This judge reads one answer at a time: the order has no effect."
    : said.size > 1
      ? "The orders disagree about who is likeliest: the judge is not sure."
      : "The orders agree about who is likeliest; the figures above are of all together.";
}

function showRead(battle, verdict) {
  const cut = Object.entries(verdict.cut).filter(([, count]) => count > 0);
  at("cut").textContent = cut.length
    ? `The battle is too long. Not read, and struck out below: ${cut.map(([name, count]) => `${count.toLocaleString("en")} tokens of ${PARTS[name]}`).join(", ")}.`
    : "All of the battle.";
  at("read").replaceChildren();
  if (!cut.length || !verdict.kept) return;
  const boxes = battle.prompt.map(() => []);
  for (const [name, title] of Object.entries(FIELDS)) {
    battle[name].forEach((text, turn) => {
      const characters = [...text]; // as the server counts them
      const part = (start, end) => characters.slice(start, end).join("");
      const shown = made("div", undefined, "text");
      if (!text) shown.append(made("span", "empty", "empty"));
      let end = 0;
      for (const [from, to] of verdict.kept[name][turn]) {
        if (from > end) shown.append(made("del", part(end, from)));
        shown.append(part(from, to));
        end = to;
      }
      if (end < characters.length) shown.append(made("del", part(end)));
      const box = made("div", undefined, name === "prompt" ? "whole" : "");
      box.append(made("strong", battle[name].length > 1 ? `${title}, turn ${turn + 1}` : title), shown);
      boxes[turn].push(box);
    });
  }
  at("read").append(...boxes.flat());
}

async function ask(event) {
  event.preventDefault();
  const battle = Object.fromEntries(Object.keys(FIELDS).map((name) => [name, turns(name)]));
  at("error").hidden = true;
  at("ask").disabled = true;
  at("ask").textContent = "Judging …";
  try {
    const answer = await request("/v1/judge", { battles: [battle], kept: true });
    const verdict = answer.verdicts[0];
    at("winner").textContent = `Likeliest: ${LIKELIEST[verdict.winner]}`;
    at("bars").replaceChildren(...answer.classes.map((name) => bar(name, verdict.probabilities[name])));
    showOrders(verdict.orders, answer.classes);
    showRead(battle, verdict);
    at("result").hidden = false;
    at("result").scrollIntoView({ block: "start" });
  } catch (error) {
    fail(error);
  } finally {
    at("ask").disabled = false;
    at("ask").textContent = "Judge";
  }
}

function fail(error) {
  at("result").hidden = true;
  at("error").textContent = error instanceof TypeError ? "The server cannot be reached." : error.message;
  at("error").hidden = false;
}

// --- the start ---

async function load() {
  about = await request("/v1/judge");
  at("judge").textContent = about.judge;
  document.title = `${about.judge}: which answer do people prefer?`;
  const scores = about.scores
    ? ` On ${about.scores.battles.toLocaleString("en")} test battles ${percent(about.scores.accuracy.value)} of its verdicts were right.`
    : "";
  at("about").textContent = `Paste a prompt and two answers: the judge says how likely people prefer either. It reads ${Math.max(...about.lengths).toLocaleString("en")} tokens at most.${scores}`;
  at("example").append(...about.examples.map((example, i) => new Option(example.about, String(i))));
}

function start() {
  const failing = () => load().catch(fail);
  at("battle").addEventListener("submit", ask);
  at("add").addEventListener("click", () => addRound());
  at("example").addEventListener("change", (event) => {
    const chosen = about.examples[event.target.value];
    show(chosen || { prompt: [""], response_a: [""], response_b: [""] });
  });
  at("exchange").addEventListener("click", () => {
    const [a, b] = [turns("response_a"), turns("response_b")];
    show({ prompt: turns("prompt"), response_a: b, response_b: a });
  });
  at("token-form").addEventListener("submit", (event) => {
    event.preventDefault();
    token = at("token").value;
    at("token-form").hidden = true;
    at("error").hidden = true;
    failing();
  });
  addRound();
  failing();
}

start();
