// What the model does, asked of the server or run here with onnxruntime-web.
// docs/serving.md says what is on the page. Texts enter it by textContent alone.

const at = (id) => document.getElementById(id);
const counts = { server: {}, browser: {} }; // answers by exit
let token = "", model, chosen, local, first; // first: the server's counts when the page was opened
let samples = []; // pairs of a picture and its button

class Refused extends Error {} // a sentence for people

async function ask(path, options = {}) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  if (response.status === 401) login();
  const body = await response.json().catch(() => ({}));
  throw new Refused(body.error ?? `the server answered ${response.status}`);
}

function login() {
  at("login").hidden = false;
  at("main").hidden = true;
  at("login_text").textContent = token && "The server does not accept this token.";
  at("token").focus();
}

// Sliders: the last place is no requirement, the others are in equal ratios.

const deadline = () => place("deadline", (v) => 0.1 * 10 ** (v / 10));
const degradation = () => place("degradation", (v) => 0.0005 * 10 ** (v / 12));

function place(id, value) {
  const slider = at(id);
  return slider.value === slider.max ? null : Number(value(Number(slider.value)).toPrecision(2));
}

function showRequirement() {
  const ms = deadline(), share = degradation();
  const texts = {
    deadline: ms === null ? "none" : `${ms} ms`,
    degradation: share === null ? "any" : `at most ${percent(share)}`,
  };
  for (const [id, text] of Object.entries(texts)) {
    at(`${id}_text`).textContent = text;
    at(id).setAttribute("aria-valuetext", text);
  }
}

const percent = (share) => `${Number((100 * share).toPrecision(3))} %`;
const where = () => document.querySelector("input[name=where]:checked").value;
const exitName = (exit) => (exit < model.exits ? `exit ${exit}` : "vote");

// The server's answer.

async function askServer(query) {
  const address = `/classify?${new URLSearchParams(query)}`;
  const started = performance.now();
  const answer = await (await ask(address, { method: "POST", body: chosen })).json();
  return { ...answer, travelled: performance.now() - started };
}

async function answerByServer() {
  const query = {}, ms = deadline(), share = degradation();
  if (ms !== null) query.deadline_ms = ms;
  if (share !== null) query.max_degradation = share;
  const answer = await askServer(query);
  return [answer, () => askServer({ point: "full" })];
}

// The browser's answer: the one file, and the choice that edgeke/device/choice.py makes.

async function openHere() {
  at("where_text").textContent = "loading the model ...";
  const ort = await import("/page/ort/ort.wasm.min.mjs");
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmPaths = "/page/ort/";
  const bytes = new Uint8Array(await (await ask("/page/model.onnx")).arrayBuffer());
  local = { ort, session: await ort.InferenceSession.create(bytes) };
  const noise = Uint8Array.from({ length: model.image_shape.reduce((a, b) => a * b) }, () => 256 * Math.random());
  const times = Array.from({ length: model.exits }, () => []);
  for (let round = 0; round < 23; round++)
    for (const [exit, list] of times.entries()) {
      const { ms } = await runHere(noise, forced(exit));
      if (round > 2) list.push(ms); // the first are slower
    }
  const cost = (quantile) => {
    let before = 0;
    return times.map((list) => {
      const sorted = list.toSorted((a, b) => a - b);
      return (before = Math.max(sorted[Math.round(quantile * (list.length - 1))], before + 1e-3));
    });
  };
  local.costs = cost(0.5);
  local.worst = cost(0.95);
}

const forced = (exit) => ({
  thresholds: Array.from({ length: model.exits }, (_, e) => (e === exit ? -1 : 2)),
  votes: Array(model.exits).fill(1),
  bias: [],
});

async function runHere(pixels, point) {
  const { ort, session } = local;
  const floats = (values) => new ort.Tensor("float32", Float32Array.from(values), [values.length]);
  const feeds = {
    image: new ort.Tensor("uint8", pixels, [1, ...model.image_shape]),
    thresholds: floats(point.thresholds),
    votes: floats(point.votes),
    bias: floats(point.bias.length ? point.bias : Array(model.classes.length).fill(0)),
  };
  const started = performance.now();
  const { probabilities, exit } = await session.run(feeds);
  return { probabilities: [...probabilities.data], exit: Number(exit.data[0]), ms: performance.now() - started };
}

function choose(ms, share) {
  if (ms === null && share === null) {
    const point = model.points.find((each) => each.name === model.default);
    return [point, point.promised[Math.max(...model.caps)]];
  }
  const deepest = ms === null ? model.exits - 1 : local.worst.findLastIndex((cost) => cost <= ms);
  if (deepest < 0)
    throw new Refused(`a deadline of ${ms} ms cannot be met: the first exit alone takes ${local.worst[0].toPrecision(3)} ms here`);
  const fitting = model.points.filter((p) => !p.unsure && !p.bias.length && p.deepest <= deepest);
  const cap = Math.max(...model.caps.filter((cap) => cap <= deepest));
  const promised = (point) => point.promised[cap] ?? Infinity; // of a point without evidence
  const kept = fitting.filter((point) => share === null || promised(point) <= share + 1e-12);
  if (!kept.length) {
    const nearest = Math.min(...fitting.map(promised));
    const remedy = Number.isFinite(nearest) ? `; the nearest attainable is ${percent(nearest)}` : "";
    throw new Refused(`a degradation of ${percent(share)} cannot be promised${remedy}`);
  }
  const cost = (point) => point.shares.reduce((sum, part, exit) => sum + part * local.costs[exit], 0);
  const better = (a, b) =>
    share !== null ? cost(a) - cost(b) || b.accuracy - a.accuracy : b.accuracy - a.accuracy || cost(a) - cost(b);
  const point = kept.toSorted(better)[0];
  return [point, point.promised[cap]];
}

async function answerHere() {
  if (!local) await openHere();
  at("where_text").textContent = "nothing leaves this device";
  const pixels = scaled(await opened(chosen));
  const answer = async (point, promised) => {
    const { probabilities, exit, ms } = await runHere(pixels, point);
    const order = probabilities.map((_, k) => k).toSorted((a, b) => probabilities[b] - probabilities[a]);
    const unsure = point.unsure && exit === model.exits;
    return {
      class: unsure ? "unsure" : model.classes[order[0]],
      probability: probabilities[order[0]],
      probabilities: Object.fromEntries(order.slice(0, 5).map((k) => [model.classes[k], probabilities[k]])),
      exit, point: point.name, milliseconds: ms, promised_max_degradation: promised,
    };
  };
  const [point, promised] = choose(deadline(), degradation());
  const full = model.points.find((each) => each.name === "full");
  return [await answer(point, promised), () => answer(full, null)];
}

// A picture's pixels as edgeke/device/decode.py reads them: upright, on white, Pillow's bicubic.

async function opened(file) {
  const bitmap = await createImageBitmap(file).catch(() => null);
  if (!bitmap) throw new Refused("the picture cannot be read; choose a JPEG or PNG");
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0);
  return context.getImageData(0, 0, canvas.width, canvas.height);
}

function scaled({ data, width, height }) {
  const [high, wide, channels] = model.image_shape;
  const pixel = channels === 1
    ? (i) => (19595 * data[4 * i] + 38470 * data[4 * i + 1] + 7471 * data[4 * i + 2] + 32768) >> 16
    : (i, c) => data[4 * i + c];
  if (model.fit === "exact" && (width !== wide || height !== high))
    throw new Refused(`the picture is ${width}x${height}, and the model takes ${wide}x${high}`);
  let part = [width, height], inside = [wide, high];
  if (model.fit === "crop") {
    const factor = Math.min(width / wide, height / high);
    part = [wide * factor, high * factor];
  }
  if (model.fit === "pad") {
    const shrink = Math.min(wide / width, high / height);
    inside = [Math.max(1, Math.round(width * shrink)), Math.max(1, Math.round(height * shrink))];
  }
  const across = weights(width, part[0], inside[0]), down = weights(height, part[1], inside[1]);
  const pixels = new Uint8ClampedArray(high * wide * channels);
  const left = (wide - inside[0]) >> 1, top = (high - inside[1]) >> 1;
  for (let c = 0; c < channels; c++) {
    const rows = across.map((line) =>
      Uint8ClampedArray.from({ length: height }, (_, y) => line.reduce((sum, [x, w]) => sum + w * pixel(y * width + x, c), 0)));
    rows.forEach((column, x) => down.forEach((line, y) => {
      const place = ((top + y) * wide + left + x) * channels + c;
      pixels[place] = line.reduce((sum, [from, w]) => sum + w * column[from], 0);
    }));
  }
  return new Uint8Array(pixels.buffer);
}

// Of each target pixel of a line: which pixels count, and how much (Keys' bicubic, a = -0.5).
function weights(size, part, target) {
  const scale = part / target, wide = Math.max(scale, 1);
  return Array.from({ length: target }, (_, i) => {
    const centre = (size - part) / 2 + (i + 0.5) * scale;
    const line = [];
    for (let x = Math.max(0, Math.floor(centre - 2 * wide)); x < Math.min(size, centre + 2 * wide); x++) {
      const d = Math.abs(x + 0.5 - centre) / wide;
      const w = d < 1 ? (1.5 * d - 2.5) * d * d + 1 : d < 2 ? ((-0.5 * d + 2.5) * d - 4) * d + 2 : 0;
      if (w) line.push([x, w]);
    }
    const total = line.reduce((sum, [, w]) => sum + w, 0);
    return line.map(([x, w]) => [x, w / total]);
  });
}

// What is shown.

function bars(list, rows) {
  while (list.children.length > rows.length) list.lastChild.remove();
  rows.forEach(([name, share, text], number) => {
    if (!list.children[number]) {
      const item = list.appendChild(document.createElement("li"));
      for (const tag of ["span", "div", "span"]) item.append(document.createElement(tag));
    }
    const [label, bar, value] = list.children[number].children;
    label.textContent = label.title = name;
    bar.style.width = `${100 * share}%`;
    value.textContent = text;
  });
}

function showExits() {
  const taken = counts[where()];
  const total = Object.values(taken).reduce((a, b) => a + b, 0);
  bars(at("exits"), Array.from({ length: model.exits + 1 }, (_, exit) => {
    const share = total ? (taken[exit] ?? 0) / total : 0;
    return [exitName(exit), share, `${taken[exit] ?? 0} (${Math.round(100 * share)} %)`];
  }));
  at("exits_text").textContent = where() === "server"
    ? "all answers of this server since the page was opened" : "answers in this browser";
}

async function countServer() {
  if (document.hidden || where() !== "server" || at("main").hidden) return;
  const text = await (await ask("/metrics")).text();
  const now = {};
  for (const [, exit, count] of text.matchAll(/^edgeke_answers_total\{exit="(\d+)"\} (\S+)$/gm)) now[exit] = Number(count);
  if (!first || Object.keys(first).some((exit) => (now[exit] ?? 0) < first[exit])) first = now; // or it was restarted
  counts.server = Object.fromEntries(Object.entries(now).map(([exit, n]) => [exit, n - (first[exit] ?? 0)]));
  showExits();
}

function showAnswer(answer, full) {
  const said = at("said");
  said.className = "";
  said.textContent = `${answer.class}, ${percent(answer.probability)}`;
  const facts = [
    ["answered by", `${exitName(answer.exit)} of ${model.exits} (0 is the first), point ${answer.point}`],
    ["time", `${answer.milliseconds.toPrecision(3)} ms` +
      (answer.travelled ? `, ${answer.travelled.toPrecision(3)} ms with the way there and back` : "") + (answer.late ? ", late" : "")],
  ];
  if (answer.promised_max_degradation != null)
    facts.push(["promised", `degradation at most ${percent(answer.promised_max_degradation)}, with probability ${percent(1 - model.delta)}`]);
  if (full) {
    const same = full.class === answer.class ? "the same" : "another answer";
    facts.push(["full network", `${full.class}, ${percent(full.probability)}, ${full.milliseconds.toPrecision(3)} ms: ${same}`]);
  }
  at("facts").replaceChildren(...facts.flatMap(([name, text]) => {
    const parts = [document.createElement("dt"), document.createElement("dd")];
    parts[0].textContent = name;
    parts[1].textContent = text;
    return parts;
  }));
  bars(at("probabilities"), Object.entries(answer.probabilities)
    .sort((a, b) => b[1] - a[1]).map(([name, p]) => [name, p, percent(Number(p.toFixed(4)))]));
}

function showError(error) {
  if (!(error instanceof Refused)) console.error(error);
  at("said").className = "error";
  at("said").textContent = error.message;
  at("facts").replaceChildren();
  bars(at("probabilities"), []);
}

// One question at a time; of those that come meanwhile, the last.

let busy = false, again = false;

async function answer() {
  showRequirement();
  if (!chosen) return;
  if (busy) return void (again = true);
  busy = true;
  do {
    again = false;
    try {
      const side = where();
      const [said, askFull] = await (side === "server" ? answerByServer() : answerHere());
      showAnswer(said, null);
      if (side === "browser") counts.browser[said.exit] = (counts.browser[said.exit] ?? 0) + 1;
      showExits();
      showAnswer(said, await askFull());
    } catch (error) {
      showError(error);
    }
  } while (again);
  busy = false;
  document.body.dataset.answered = Number(document.body.dataset.answered ?? 0) + 1;
}

async function choosePicture(blob, button = null) {
  chosen = blob;
  for (const [, each] of samples) each.setAttribute("aria-pressed", each === button);
  const bitmap = await createImageBitmap(blob).catch(() => null);
  const canvas = at("picture"), shrink = bitmap ? Math.min(1, 400 / Math.max(bitmap.width, bitmap.height)) : 1;
  canvas.width = bitmap ? Math.ceil(bitmap.width * shrink) : 1;
  canvas.height = bitmap ? Math.ceil(bitmap.height * shrink) : 1;
  if (bitmap) canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  await answer();
}

async function showSamples() {
  const blobs = await Promise.all(model.samples.map(async (name) =>
    (await ask(`/page/samples/${encodeURIComponent(name)}`)).blob()));
  samples = blobs.map((blob, number) => {
    const button = document.createElement("button"), image = document.createElement("img");
    button.type = "button";
    button.setAttribute("aria-pressed", "false");
    image.alt = `sample ${number + 1}`;
    image.src = URL.createObjectURL(blob);
    button.append(image);
    button.addEventListener("click", () => choosePicture(blob, button));
    return [blob, button];
  });
  at("samples").replaceChildren(...samples.map(([, button]) => button));
  at("all").hidden = !blobs.length;
}

async function start() {
  model = await (await ask("/page/model.json")).json();
  at("login").hidden = true;
  at("main").hidden = false;
  const [height, width] = model.image_shape;
  at("about").textContent =
    `A model that answers early when it is sure: ${model.classes.length} classes, ${width} x ${height} pixels, ${model.exits} exits.`;
  at("browser").disabled = !model.browser;
  at("where_text").textContent = model.browser ? "" : "for that, `make web` puts onnxruntime-web on the server";
  showRequirement();
  await showSamples();
  await countServer();
  showExits();
}

const failing = (action) => (...values) => action(...values).catch(showError);
for (const id of ["deadline", "degradation"]) at(id).addEventListener("input", failing(answer));
for (const each of document.getElementsByName("where"))
  each.addEventListener("change", failing(async () => (showExits(), await answer())));
at("file").addEventListener("change", failing(async () => at("file").files[0] && (await choosePicture(at("file").files[0]))));
at("all").addEventListener("click", failing(async () => {
  for (const [blob, button] of samples) await choosePicture(blob, button);
}));
at("login").addEventListener("submit", failing(async (event) => {
  event.preventDefault();
  token = at("token").value;
  await start();
}));
const drop = at("drop");
for (const kind of ["dragenter", "dragover", "dragleave", "drop"])
  document.addEventListener(kind, (event) => {
    event.preventDefault(); // a picture beside the field must not replace the page
    drop.classList.toggle("over", kind === "dragenter" || kind === "dragover");
  });
document.addEventListener("drop", failing(async (event) => {
  const file = event.dataTransfer.files[0];
  if (file) await choosePicture(file);
}));
setInterval(() => countServer().catch(() => {}), 1000); // the server may be away for a while
failing(start)();

const timesHere = () => ({ costs: local.costs, worst: local.worst });
export { choose, opened, scaled, timesHere }; // for tests
