"use strict";
const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const names = JSON.parse($("names").textContent);
const pairs = data.pairs;
const ON_A_PAGE = 25;
const SIDES = ["chosen", "rejected"];
// names of turns as templates write them: something of the template follows, no text
const ROLES = /\b(system|developer|user|human|assistant|model|tool)(?=[\n<|\]:])/g;
const hidden = new RegExp(data.hidden, "gu");
const hiddenOrSpace = new RegExp(data.hidden + "|\\s", "gu");

// The numbers of a pair that it can be sorted and filtered by: key, name, hint, digits ("%": a share),
// and the class of its column.
const COLUMNS = [
  ["margin", "margin", "Σ implicit reward, chosen − rejected", 3, ""],
  ["gap", "gap", "mean " + names.symbol + ", chosen − rejected", 4, "less"],
  ["disagreement", "disagreement", "mean over the tokens; see the overview", 3, "less"],
  ["agreement", "same sign", "share of the tokens whose two rewards have one sign", "%", "less minor"],
  ["mean_chosen", names.symbol + " chosen", "mean over its tokens", 4, "less minor"],
  ["mean_rejected", names.symbol + " rejected", "mean over its tokens", 4, "less minor"],
  ["tokens", "tokens", "of both responses", 0, "less"],
].filter(([key]) => pairs.some((pair) => key in pair));
const KEYS = COLUMNS.map(([key]) => key);

const WORDS = [
  ["piece", "token", "", ""],
  ["count", "count", 0, ""],
  ["chosen", "in chosen", 0, "less minor"],
  ["rejected", "in rejected", 0, "less minor"],
  ["mean_chosen", names.symbol + " chosen", 4, ""],
  ["mean_rejected", names.symbol + " rejected", 4, ""],
  ["mean_implicit", "implicit", 4, "less"],
  ["opposite", "opposite signs", "%", "less"],
].filter(([key]) => key in data.by_token.columns);
const LISTS = Object.keys(data.lists);
const MODES = Object.keys(data.limits);
const TABS = [...$("tabs").querySelectorAll("button")].map((tab) => tab.id.slice(4));

const start = () => ({
  view: "overview", q: "", sort: "", ranges: {}, page: 1, open: [], color: MODES[0] ?? "", scale: "", words: "-count",
  word: "", least: 1, list: LISTS[0] ?? "",
});
let state = start();
let shownWords = innerWidth < 760 ? 25 : 100;
let tokens = new Map(); // element of a token on show -> { side, t }

// ---- elements and text

function make(parent, tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

function button(parent, className, text, act) {
  const element = make(parent, "button", className, text);
  element.type = "button";
  element.addEventListener("click", act);
  return element;
}

function number(x, digits = 3) {
  if (x === undefined || x === null) return "";
  if (digits === "%") return (100 * x).toFixed(1) + " %";
  // a small number would lose its digits
  const few = x !== 0 && digits > 0 && Math.abs(x) < 10 ** -digits * 5;
  const text = few ? (Math.abs(x) < 1e-4 ? x.toExponential(1) : x.toPrecision(2)) : x.toFixed(digits);
  return text.replace(/-/g, "−");
}

function signed(x, digits) {
  return (x > 0 ? "+" : "") + number(x, digits);
}

function scaleNumber(x) {
  return String(Number(x.toPrecision(2))).replace(/-/g, "−");
}

function symbol(char) {
  if (char === " ") return "·";
  return data.symbols[char] ?? "⟨U+" + char.codePointAt(0).toString(16).toUpperCase().padStart(4, "0") + "⟩";
}

// Text as text nodes; characters without a shape as symbols, a line break as its symbol and the break.
function show(parent, text) {
  let at = 0;
  for (const match of text.matchAll(/^\s+$/u.test(text) ? hiddenOrSpace : hidden)) {
    parent.append(text.slice(at, match.index));
    make(parent, "span", "mark", symbol(match[0]));
    at = match.index + match[0].length;
  }
  parent.append(text.slice(at));
  // part of a character, or one that only joins others: something to point at
  if (/^[\u200c\u200d\ufe0e\ufe0f]*$/u.test(text)) make(parent, "span", "mark", "▫");
}

// A token by itself: the blank that it begins with can be seen.
function showPiece(parent, text) {
  if (/^ ./.test(text)) make(parent, "span", "mark", "·");
  show(parent, oneLine(text).replace(/^ (?=.)/, "").slice(0, 80));
}

const oneLine = (text) => text.replace(/\n/g, "␊").replace(/\t/g, "⇥");

// ---- colours

const limit = (mode) => (state.scale && mode === state.color ? Number(state.scale) : data.limits[mode]?.["0.95"]);

function value(side, t, kind) {
  if (kind !== "product") return side[kind]?.[t];
  return "mean_product" in side ? side.rewards[t] * side.implicit[t] : undefined;
}

function paint(element, { side, t }) {
  const share = (value(side, t, state.color) ?? 0) / limit(state.color);
  element.style.setProperty("--v", Math.min(Math.abs(share), 1).toFixed(3));
  element.classList.toggle("up", share > 0);
  element.classList.toggle("down", share < 0);
}

function disagreement(side, t) {
  const product = value(side, t, "product");
  return product === undefined ? undefined : Math.max(-product, 0) / (data.rms.rewards * data.rms.implicit);
}

function showColours() {
  if (!MODES.length) return;
  $("color").value = state.color;
  const end = limit(state.color);
  [...$("legend").querySelectorAll("span")].forEach((label, i) => {
    label.textContent = scaleNumber((end * (i - 2)) / 2);
  });
  if (document.activeElement !== $("limit")) $("limit").value = Number(end.toPrecision(2));
  const choices = Object.entries(data.limits[state.color]);
  $("quantile").replaceChildren();
  for (const [quantile, x] of choices) {
    const option = make($("quantile"), "option", "", quantile === "1" ? "all tokens" : Math.round(100 * quantile) + " % of tokens");
    option.value = x;
    option.selected = Number(end.toPrecision(2)) === x;
  }
  if (!choices.some(([, x]) => x === Number(end.toPrecision(2)))) {
    const option = make($("quantile"), "option", "", "as typed");
    option.value = end;
    option.selected = true;
  }
  tokens.forEach((token, element) => paint(element, token));
}

// ---- which pairs are shown

const searched = new Map();
function textOf(n) {
  if (!searched.has(n)) {
    const { where, prompt, chosen, rejected } = pairs[n];
    const all = [where, prompt.join(""), chosen.pieces.join(""), rejected.pieces.join("")];
    searched.set(n, all.join("\n").toLowerCase());
  }
  return searched.get(n);
}

function within(pair, ranges) {
  return Object.entries(ranges).every(([key, [low, high]]) => {
    const x = pair[key];
    return x !== undefined && (low === "" || x >= Number(low)) && (high === "" || x <= Number(high));
  });
}

function matching() {
  const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
  const found = pairs.map((_, n) => n).filter((n) => within(pairs[n], state.ranges) && words.every((x) => textOf(n).includes(x)));
  return sorted(found, (n, key) => pairs[n][key], state.sort);
}

// rule: a key, "-" before it for the largest first; what lacks the number comes last
function sorted(list, get, rule) {
  const key = rule.replace("-", "");
  if (!key) return list;
  const sign = rule.startsWith("-") ? -1 : 1;
  return list
    .map((item, place) => [get(item, key) ?? null, place, item])
    .sort(([a, m], [b, n]) => {
      if (a === null || b === null) return (a === null) - (b === null) || m - n;
      const less = typeof a === "string" ? a.localeCompare(b) : a - b;
      return sign * less || m - n;
    })
    .map(([, , item]) => item);
}

// ---- the pairs

function headers(row, columns, rule, choose) {
  row.replaceChildren();
  for (const [key, name, hint, numeric, className] of columns) {
    const th = make(row, "th", (numeric ? "num " : "") + className);
    th.scope = "col";
    th.title = hint;
    if (key === "") {
      th.textContent = name;
      continue;
    }
    th.dataset.key = key;
    if (rule.replace("-", "") === key) th.setAttribute("aria-sort", rule.startsWith("-") ? "descending" : "ascending");
    button(th, "", name, () => choose(key));
  }
}

function turned(rule, key, first = "-") {
  return rule === first + key ? (first ? key : "-" + key) : first + key;
}

function showPairs() {
  const found = matching();
  const last = Math.max(1, Math.ceil(found.length / ON_A_PAGE));
  state.page = Math.min(Math.max(state.page, 1), last);
  const from = (state.page - 1) * ON_A_PAGE;
  const page = found.slice(from, from + ON_A_PAGE);
  const columns = COLUMNS.map(([key, name, hint, , className]) => [key, name, hint, true, className]);
  const all = [["n", "#", "position in the file", true, "n"], ["", "prompt", "", false, ""], ...columns];
  headers($("pairs").tHead.rows[0], all, state.sort || "n", (key) => change({ sort: key === "n" ? "" : turned(state.sort, key), page: 1 }));
  for (const body of [...$("pairs").tBodies]) body.remove();
  tokens = new Map();
  for (const n of page) pairRow(n);
  $("none").hidden = found.length > 0;
  $("pages").hidden = last === 1;
  $("page").textContent = from + 1 + "–" + (from + page.length) + " of " + found.length;
  $("previous").disabled = state.page === 1;
  $("next").disabled = state.page === last;
  $("count").textContent = found.length === pairs.length ? pairs.length + " pairs" : found.length + " of " + pairs.length + " pairs";
  const active = Object.keys(state.ranges).length;
  $("active").textContent = active ? " (" + active + ")" : "";
  showPresets();
}

function pairRow(n) {
  const pair = pairs[n];
  const body = make($("pairs"), "tbody");
  body.id = "row-" + (n + 1);
  const row = make(body, "tr", "row");
  make(row, "td", "num n", String(n + 1));
  const cell = make(row, "th", "prompt");
  cell.scope = "row";
  const toggle = make(cell, "button");
  toggle.type = "button";
  show(make(toggle, "span"), pair.snippet || "(no text)");
  show(make(cell, "small"), pair.where);
  for (const [key, , , digits, className] of COLUMNS) {
    const against = (key === "margin" || key === "gap") && pair[key] < 0 ? " against" : "";
    make(row, "td", "num " + className + against, number(pair[key], digits));
  }
  row.addEventListener("click", () => {
    const open = state.open.includes(n) ? state.open.filter((x) => x !== n) : [...state.open, n];
    state.open = open;
    openRow(body, n, open.includes(n));
    keep();
  });
  openRow(body, n, state.open.includes(n));
}

function openRow(body, n, open) {
  const row = body.rows[0];
  row.classList.toggle("open", open);
  row.querySelector("button").setAttribute("aria-expanded", String(open));
  if (open && body.rows.length === 1) detail(make(make(body, "tr", "detail"), "td"), n);
  if (body.rows.length > 1) body.rows[1].hidden = !open;
}

function detail(cell, n) {
  const pair = pairs[n];
  cell.colSpan = 2 + COLUMNS.length;
  prompt(make(cell, "div", "ask text"), pair.prompt);
  const sides = make(cell, "div", "sides");
  for (const name of SIDES) response(sides, name, pair[name]);
}

// Texts and, folded, what the chat template wrote between them, in turn.
function prompt(parent, parts) {
  parent.tabIndex = 0;
  parent.setAttribute("aria-label", "prompt");
  parts.forEach((part, i) => {
    if (i % 2 === 0) {
      if (part) show(make(parent, "span"), part);
      return;
    }
    const roles = part.toLowerCase().match(ROLES) ?? [];
    const label = [...new Set(roles)].join(" → ") || "template";
    const fold = button(parent, "fold", label, () => {
      const opened = text.hidden;
      text.hidden = !opened;
      fold.setAttribute("aria-expanded", String(opened));
    });
    fold.title = "What the chat template writes here";
    fold.setAttribute("aria-expanded", "false");
    const text = make(parent, "span", "folded");
    text.hidden = true;
    show(text, part);
  });
}

function fact(parent, term, text) {
  const div = make(parent, "div");
  make(div, "dt", "", term);
  make(div, "dd", "", text);
}

function response(parent, name, side) {
  const section = make(parent, "section", name);
  const header = make(section, "header");
  make(header, "h3", "", name[0].toUpperCase() + name.slice(1));
  const facts = make(header, "dl");
  const count = side.pieces.length;
  fact(facts, "tokens", String(count));
  if ("sum_rewards" in side && count) fact(facts, "mean " + names.symbol, number(side.sum_rewards / count, 4));
  if ("sum_rewards" in side) fact(facts, "Σ " + names.symbol, number(side.sum_rewards));
  if ("sum_implicit" in side) fact(facts, "Σ implicit", number(side.sum_implicit));
  if ("sign_agreement" in side) fact(facts, "same sign", number(side.sign_agreement, "%"));
  if (side.marked?.length) fact(facts, names.truth, String(side.marked.length));
  const text = make(section, "div", "text");
  text.tabIndex = 0;
  text.setAttribute("role", "group");
  text.setAttribute("aria-label", name + " response; the arrow keys go from token to token");
  const special = new Set(side.special);
  const marked = new Set(side.marked);
  // what stands before a token and is not scored
  const other = (t) => {
    if (side.others?.[t]) show(make(text, "span", "other"), side.others[t]);
  };
  side.pieces.forEach((piece, t) => {
    other(t);
    const element = make(text, "span", "tok" + (special.has(t) ? " special" : "") + (marked.has(t) ? " marked" : ""));
    show(element, piece);
    tokens.set(element, { side, t });
    if (MODES.length) paint(element, { side, t });
  });
  other(count);
  text.addEventListener("keydown", (event) => step(event, text));
  text.addEventListener("blur", () => point(null));
}

// ---- a token's numbers

let current = null;
function point(element) {
  current?.classList.remove("at");
  current = tokens.has(element) ? element : null;
  $("tip").hidden = !current;
  if (!current) return;
  const tip = $("tip");
  const { side, t } = tokens.get(current);
  tip.replaceChildren();
  show(make(make(tip, "div"), "strong"), oneLine(side.pieces[t]).slice(0, 200));
  const facts = make(tip, "dl");
  fact(facts, "token", t + 1 + " of " + side.pieces.length);
  for (const kind of ["rewards", "implicit", "product"]) {
    const x = value(side, t, kind);
    if (x !== undefined) fact(facts, names[kind], signed(x, 4));
  }
  const apart = disagreement(side, t);
  if (apart) fact(facts, "disagreement", number(apart));
  if (side.marked?.includes(t)) make(tip, "div", "", names.truth);
  const box = current.getClientRects()[0] ?? current.getBoundingClientRect();
  const left = Math.min(box.left, innerWidth - tip.offsetWidth - 8);
  const below = box.bottom + 6 + tip.offsetHeight < innerHeight;
  tip.style.left = Math.max(left, 8) + "px";
  tip.style.top = (below ? box.bottom + 6 : box.top - tip.offsetHeight - 6) + "px";
}

function step(event, text) {
  const all = [...text.children];
  const at = all.indexOf(current);
  const moves = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1 };
  if (event.key === "Escape") return point(null);
  if (!(event.key in moves) || !all.length) return;
  event.preventDefault();
  const element = all[Math.min(Math.max(moves[event.key], 0), all.length - 1)];
  element.scrollIntoView({ block: "nearest" });
  point(element);
  element.classList.add("at");
}

function go(n, name, t) {
  change({ view: "pairs", q: "", ranges: {}, open: [...new Set([...state.open, n])], page: 1 });
  state.page = 1 + Math.floor(matching().indexOf(n) / ON_A_PAGE);
  showPairs();
  keep();
  const text = document.querySelector("#row-" + (n + 1) + " section." + name + " .text");
  const element = text.children[t];
  element.scrollIntoView({ block: "center" });
  text.focus({ preventScroll: true });
  element.classList.add("found"); // stays when the pointer moves on
  point(element);
}

// ---- presets, sorting and filters

const PRESETS = [
  ["All pairs", {}, ""],
  ["Rewards miss the label", { gap: ["", "0"] }, "gap"],
  ["Policy misses the label", { margin: ["", "0"] }, "margin"],
  ["Largest disagreement", {}, "-disagreement"],
].filter(([, ranges, sort]) => [...Object.keys(ranges), sort.replace("-", "")].every((key) => !key || KEYS.includes(key)));

function showPresets() {
  $("presets").replaceChildren();
  for (const [name, ranges, sort] of PRESETS) {
    const chip = button($("presets"), "", name, () => change({ ranges: { ...ranges }, sort, page: 1, q: "" }));
    if (Object.keys(ranges).length) make(chip, "b", "", String(pairs.filter((pair) => within(pair, ranges)).length));
    const same = JSON.stringify(ranges) === JSON.stringify(state.ranges) && sort === state.sort && !state.q;
    chip.setAttribute("aria-pressed", String(same));
  }
  for (const field of $("ranges").querySelectorAll("input")) {
    const [key, end] = field.name.split(".");
    if (document.activeElement !== field) field.value = state.ranges[key]?.[Number(end)] ?? "";
  }
  if (document.activeElement !== $("q")) $("q").value = state.q;
  $("sort").value = state.sort;
}

function makeFilters() {
  for (const [key, name, hint, digits] of COLUMNS) {
    const known = pairs.map((pair) => pair[key]).filter((x) => x !== undefined);
    const ends = [Math.min(...known), Math.max(...known)];
    const row = make($("ranges"), "div", "range");
    make(row, "span", "", name).title = hint;
    ends.forEach((end, i) => {
      if (i) make(row, "span", "hint", "to");
      const field = make(row, "input", "field");
      field.type = "number";
      field.step = "any";
      field.name = key + "." + i;
      field.placeholder = String(Number(end.toPrecision(3)));
      field.setAttribute("aria-label", name + (i ? " at most" : " at least"));
      field.addEventListener("input", () => {
        const range = [...(state.ranges[key] ?? ["", ""])];
        range[i] = field.value;
        const { [key]: _, ...others } = state.ranges;
        change({ ranges: range.some(Boolean) ? { ...others, [key]: range } : others, page: 1 });
      });
    });
  }
  make($("sort"), "option", "", "file order").value = "";
  for (const [key, name] of COLUMNS) {
    make($("sort"), "option", "", name + ", low first").value = key;
    make($("sort"), "option", "", name + ", high first").value = "-" + key;
  }
}

// ---- tokens

function showTokens() {
  const { columns } = data.by_token;
  const wanted = state.word.toLowerCase();
  let found = columns.piece.map((_, i) => i).filter((i) => columns.count[i] >= state.least && columns.piece[i].toLowerCase().includes(wanted));
  found = sorted(found, (i, key) => columns[key][i], state.words);
  const all = WORDS.map(([key, name, digits, className]) => [key, name, "", key !== "piece", className]);
  headers($("words").tHead.rows[0], all, state.words, (key) => change({ words: turned(state.words, key, key === "piece" ? "" : "-") }));
  const body = $("words").tBodies[0];
  body.replaceChildren();
  for (const i of found.slice(0, shownWords)) {
    const row = make(body, "tr");
    for (const [key, , digits, className] of WORDS) {
      if (key === "piece") showPiece(make(make(row, "td"), "span", "piece"), columns.piece[i]);
      else make(row, "td", "num " + className, number(columns[key][i], digits));
    }
  }
  const listed = columns.piece.length;
  const rest = data.by_token.texts > listed ? ", the commonest of " + data.by_token.texts : "";
  $("words-count").textContent = (found.length === listed ? "" : found.length + " of ") + listed + " tokens" + rest;
  $("more").hidden = found.length <= shownWords;
  if (document.activeElement !== $("word")) $("word").value = state.word;
  if (document.activeElement !== $("least")) $("least").value = state.least;
  showList();
}

function showList() {
  for (const chip of $("lists").children) chip.setAttribute("aria-pressed", String(chip.dataset.list === state.list));
  $("found").replaceChildren();
  for (const [n, s, t] of data.lists[state.list] ?? []) {
    const side = pairs[n][SIDES[s]];
    const item = button(make($("found"), "li"), "", undefined, () => go(n, SIDES[s], t));
    const text = make(item, "span", "text");
    for (let i = Math.max(0, t - 7); i < Math.min(side.pieces.length, t + 5); i++) {
      const element = make(text, "span", i === t ? "tok" + (side.marked?.includes(t) ? " marked" : "") : "");
      show(element, oneLine(side.pieces[i]).slice(0, 60));
      if (i === t && MODES.length) {
        element.style.setProperty("--v", "1");
        element.classList.add(side.rewards[t] < 0 ? "down" : "up");
      }
    }
    const facts = ["pair " + (n + 1) + ", " + SIDES[s], names.symbol + " " + signed(side.rewards[t], 4)];
    if (side.implicit) facts.push("implicit " + signed(side.implicit[t], 4));
    if (disagreement(side, t)) facts.push("disagreement " + number(disagreement(side, t), 1));
    make(item, "small", "", facts.join(" · "));
  }
}

// ---- export

// Text that a spreadsheet would take for a formula gets an apostrophe before it.
function csvCell(x) {
  const text = typeof x === "string" ? x.replace(/^(?=[=+\-@\t\r])/, "'") : String(x ?? "");
  return /[",\n\r]/.test(text) ? '"' + text.replace(/"/g, '""') + '"' : text;
}

function asCsv(list) {
  const rows = [["pair", "where", "prompt", ...SIDES, ...KEYS]];
  for (const n of list) {
    const pair = pairs[n];
    const texts = [pair.prompt.join(""), ...SIDES.map((name) => pair[name].pieces.join(""))];
    rows.push([n + 1, pair.where, ...texts, ...KEYS.map((key) => pair[key])]);
  }
  return rows.map((row) => row.map(csvCell).join(",") + "\r\n").join("");
}

function asJsonl(list) {
  const rows = list.map((n) => {
    const pair = pairs[n];
    const row = { pair: n + 1, where: pair.where, prompt: pair.prompt.join("") };
    for (const name of SIDES) {
      const { pieces, rewards, implicit, marked } = pair[name];
      row[name] = { tokens: pieces, rewards, implicit, marked };
    }
    for (const key of KEYS) row[key] = pair[key];
    return JSON.stringify(row) + "\n";
  });
  return rows.join("");
}

function save(kind) {
  const list = matching();
  const blob = new Blob([kind === "csv" ? asCsv(list) : asJsonl(list)], { type: "text/plain" });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = "pairs." + kind;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

// ---- the address keeps what is shown

function keep() {
  const first = start();
  const parts = [];
  for (const name of ["view", "q", "sort", "color", "scale", "words", "word", "least", "list"]) {
    if (state[name] !== first[name]) parts.push(name + "=" + encodeURIComponent(state[name]));
  }
  for (const [key, range] of Object.entries(state.ranges)) parts.push(key + "=" + range.map(encodeURIComponent).join(":"));
  if (state.page > 1) parts.push("page=" + state.page);
  for (const n of state.open) parts.push("pair-" + (n + 1));
  history.replaceState(null, "", "#" + parts.join("&"));
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

// Anything unknown is passed over.
function read() {
  const found = start();
  let pairGiven = false;
  let viewGiven = false;
  for (const part of location.hash.slice(1).split("&")) {
    const [, name, given] = /^(\w+)=(.*)$/.exec(part) ?? [];
    const text = decoded(given ?? "");
    const pair = /^pair[-=](\d+)$/.exec(part);
    if (pair && pairs[pair[1] - 1]) found.open.push(pair[1] - 1);
    if (name === "view" && TABS.includes(text)) [found.view, viewGiven] = [text, true];
    if (["q", "word"].includes(name)) found[name] = text;
    if (name === "sort" && KEYS.includes(text.replace("-", ""))) found.sort = text;
    if (name === "words" && WORDS.some(([key]) => key === text.replace("-", ""))) found.words = text;
    if (name === "color" && MODES.includes(text)) found.color = text;
    if (name === "list" && LISTS.includes(text)) found.list = text;
    if (name === "scale" && Number(text) > 0) found.scale = text;
    if (["page", "least"].includes(name) && Number(text) >= 1) found[name] = Math.floor(Number(text));
    if (KEYS.includes(name) && /^[^:]*:[^:]*$/.test(text)) {
      const range = text.split(":");
      if (range.some(Boolean) && range.every((x) => !Number.isNaN(Number(x)))) found.ranges[name] = range;
    }
    pairGiven ||= part.startsWith("pair") || KEYS.includes(name) || ["q", "sort", "page"].includes(name);
  }
  if (pairGiven && !viewGiven) found.view = "pairs";
  state = found;
  showAll();
  if (!found.open.length) return;
  const places = matching();
  const at = places.indexOf(found.open[0]);
  if (at >= 0 && found.page === 1) {
    state.page = 1 + Math.floor(at / ON_A_PAGE);
    showPairs();
  }
  measure();
  $("row-" + (found.open[0] + 1))?.scrollIntoView();
}

function change(changes) {
  Object.assign(state, changes);
  showAll();
  keep();
}


const panelOf = (view) => $(view === "pairs" ? "pair-list" : view);

function showAll() {
  for (const view of TABS) {
    panelOf(view).hidden = view !== state.view;
    $("tab-" + view).setAttribute("aria-selected", String(view === state.view));
    $("tab-" + view).tabIndex = view === state.view ? 0 : -1;
  }
  $("tools").hidden = state.view !== "pairs";
  point(null);
  if (state.view === "pairs") {
    showPairs();
    showColours();
  }
  if (state.view === "tokens") showTokens();
}

// ---- events

let waiting = 0;
function later(act) {
  clearTimeout(waiting);
  waiting = setTimeout(act, 120);
}

$("tabs").hidden = false;
for (const view of TABS) {
  $("tab-" + view).addEventListener("click", () => {
    change({ view });
    scrollTo(0, 0);
  });
}
$("tabs").addEventListener("keydown", (event) => {
  const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!move) return;
  const view = TABS[(TABS.indexOf(state.view) + move + TABS.length) % TABS.length];
  change({ view });
  $("tab-" + view).focus();
});
makeFilters();
$("q").addEventListener("input", (event) => later(() => change({ q: event.target.value, page: 1 })));
$("sort").addEventListener("change", (event) => change({ sort: event.target.value, page: 1 }));
$("filters").addEventListener("click", () => {
  $("panel").hidden = !$("panel").hidden;
  $("filters").setAttribute("aria-expanded", String(!$("panel").hidden));
});
$("clear").addEventListener("click", () => change({ ranges: {}, q: "", sort: "", page: 1 }));
$("csv").addEventListener("click", () => save("csv"));
$("jsonl").addEventListener("click", () => save("jsonl"));
for (const element of document.querySelectorAll("[data-export]")) {
  element.addEventListener("click", () => save(element.dataset.export));
}
$("previous").addEventListener("click", () => turn(-1));
$("next").addEventListener("click", () => turn(1));
function turn(pages) {
  change({ page: state.page + pages });
  $("pair-list").scrollIntoView();
}
if (MODES.length) {
  $("color").addEventListener("change", (event) => change({ color: event.target.value, scale: "" }));
  $("limit").addEventListener("input", (event) => {
    if (Number(event.target.value) > 0) change({ scale: event.target.value });
  });
  $("quantile").addEventListener("change", (event) => {
    const usual = Number(event.target.value) === data.limits[state.color]["0.95"];
    change({ scale: usual ? "" : event.target.value });
  });
}
$("word").addEventListener("input", (event) => later(() => change({ word: event.target.value })));
$("least").addEventListener("input", (event) => change({ least: Math.max(1, Math.floor(Number(event.target.value))) || 1 }));
$("more").addEventListener("click", () => {
  shownWords += 200;
  showTokens();
});
for (const chip of $("lists").children) chip.addEventListener("click", () => change({ list: chip.dataset.list }));
document.addEventListener("pointerover", (event) => {
  if (event.target instanceof Element) point(event.target.closest(".sides .tok"));
});
document.addEventListener("scroll", () => { if (!current?.classList.contains("at")) point(null); }, { passive: true });
addEventListener("hashchange", read);
function measure() {
  document.documentElement.style.setProperty("--top", $("top").offsetHeight + "px");
}
new ResizeObserver(measure).observe($("top"));
read();
