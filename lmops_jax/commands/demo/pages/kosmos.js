// The page of `lmops demo kosmos`: asks with a picture and a prompt, and shows text and boxes.

import {answered, asked, base64, begins, byId, fill, made, numbersOf, showError} from "/demo.js";

const PRESETS = [
  // name, prompt, and what of it is selected to be typed over
  ["Caption", "<grounding> An image of"],
  ["In detail", "<grounding> Describe this image in detail:"],
  ["Question", "<grounding> Question: What is in the picture? Answer:", "What is in the picture?"],
  ["Where is …", "<grounding><phrase> the dog</phrase>", "the dog"],
  ["Free text", ""],
];
const COLOURS = 8; // classes c0 to c7 of the style sheet
const HINT = byId("hint").textContent;
const form = byId("ask");
let facts = null;
let picture = null; // the file
let pinned = null; // the entity that stays highlighted

// ---------------------------------------------------------------------------------- the picture

function setPicture(file) {
  showError("");
  if (file && file.size > facts.max_picture_bytes) {
    showError(`${file.name} has ${file.size.toLocaleString()} bytes, more than the ` +
      `${facts.max_picture_bytes.toLocaleString()} of this demo; make it smaller.`);
    file = null;
  }
  picture = file;
  showFile(byId("preview"), file);
  byId("preview").hidden = !file;
  byId("hint").hidden = Boolean(file);
  byId("hint").textContent = HINT;
  byId("remove").hidden = !file;
  if (file) {
    byId("given").textContent = file.name;
  } else {
    byId("file").value = "";
    byId("given").textContent = "No picture: the model continues the prompt alone.";
  }
}

// The contents of a file, or nothing, in an image of the page.
function showFile(image, file) {
  if (image.src) URL.revokeObjectURL(image.src);
  if (file) image.src = URL.createObjectURL(file);
  else image.removeAttribute("src");
}

byId("file").addEventListener("change", () => {
  if (byId("file").files.length) setPicture(byId("file").files[0]);
});
byId("remove").addEventListener("click", () => {
  setPicture(null);
  byId("file").focus();
});
byId("preview").addEventListener("error", () => {
  byId("preview").hidden = true;
  byId("hint").hidden = false;
  byId("hint").textContent = "This browser cannot show the file; the model may read it all the same.";
});
// Anywhere on the page, so that a near miss does not make the browser open the file instead.
for (const type of ["dragover", "drop", "dragleave"]) {
  document.addEventListener(type, (event) => {
    if (type !== "dragleave") event.preventDefault();
    byId("drop").classList.toggle("over", type === "dragover");
    if (type !== "drop") return;
    if (event.dataTransfer.files.length) setPicture(event.dataTransfer.files[0]);
    else showError("What was dropped is not a file; save the picture first, or copy and paste it.");
  });
}
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) {
    event.preventDefault();
    setPicture(event.clipboardData.files[0]);
  }
});

// ------------------------------------------------------------------------------------- the prompt

function preset(button, text, selected) {
  const prompt = byId("prompt");
  if (!facts.grounds) text = text.replace("<grounding>", "").trim();
  prompt.value = text;
  for (const other of byId("presets").children) {
    other.setAttribute("aria-pressed", other === button);
  }
  if (selected || !text) {
    const start = selected ? text.indexOf(selected) : 0;
    prompt.focus();
    prompt.setSelectionRange(start, start + (selected ? selected.length : 0));
  }
}

function showSearch() {
  const chosen = form.elements.search.value;
  for (const row of form.querySelectorAll("[data-search]")) {
    row.hidden = row.dataset.search !== chosen;
    for (const input of row.querySelectorAll("input")) input.disabled = row.hidden;
  }
}

for (const radio of form.elements.search) radio.addEventListener("change", showSearch);

async function begin() {
  facts = await asked("/facts");
  byId("facts").textContent = `${facts.model}, a model of the family ${facts.family} with ` +
    `${facts.parameters} parameters, on ${facts.device}. ` +
    (facts.sees ? "" : "It reads texts only.");
  byId("prompt-note").textContent = facts.grounds
    ? "Behind <grounding> the model also writes where things are. Ctrl+Enter asks."
    : "This model writes no boxes. Ctrl+Enter asks.";
  byId("grammar-row").hidden = !facts.grounds;
  fill(form, facts);
  for (const [name, text, selected] of PRESETS) {
    if (text.includes("<phrase>") && !facts.grounds) continue;
    const button = made("button", "", name);
    button.type = "button";
    button.addEventListener("click", () => preset(button, text, selected));
    byId("presets").append(button);
  }
  preset(byId("presets").firstChild, PRESETS[0][1]);
  showSearch();
}

// ------------------------------------------------------------------------------------- the answer

begins(form, begin, async () => {
  const {elements} = form;
  const from = picture;
  const request = {
    prompt: byId("prompt").value, search: elements.search.value, grammar: elements.grammar.checked,
    ...numbersOf(form),
  };
  if (from) request.picture = {name: from.name, base64: await base64(from)};
  show(from, await answered(request, (text) => {
    byId("written").textContent = text;
  }));
});

// A model may name the corners in the wrong order.
function edges([x1, y1, x2, y2]) {
  return {left: Math.min(x1, x2), top: Math.min(y1, y2),
    right: Math.max(x1, x2), bottom: Math.max(y1, y2)};
}

function inPercent(box) {
  return Object.values(edges(box)).map((fraction) => Math.round(fraction * 100));
}

function inNumbers(box) {
  const [left, top, right, bottom] = inPercent(box);
  return `x ${left} to ${right} %, y ${top} to ${bottom} %`;
}

function inWords(box) {
  const [left, top, right, bottom] = inPercent(box);
  return `from ${left} percent left, ${top} percent top, to ${right} and ${bottom} percent`;
}

function colour(number) {
  return `c${number % COLOURS}`;
}

function show(from, answer) {
  pinned = null;
  const shown = byId("shown");
  showFile(shown, from);
  byId("stage").hidden = !from;
  byId("answer-columns").classList.toggle("columns", Boolean(from));
  if (from) {
    // Fixed beforehand, so that boxes are right also where the browser cannot show the file.
    shown.width = answer.width;
    shown.height = answer.height;
    byId("stage").style.aspectRatio = `${answer.width} / ${answer.height}`;
    shown.alt = `The picture ${from.name}`;
  }
  const boxes = answer.entities.flatMap(({name, boxes}, number) =>
    boxes.map((box) => [boxOf(number, edges(box)), labelOf(name, number, edges(box))]));
  // Names behind all boxes in the order of the page, so that no line crosses them.
  byId("boxes").replaceChildren(...boxes.map((pair) => pair[0]), ...boxes.map((pair) => pair[1]));
  byId("caption").replaceChildren(...answer.pieces.map(({text, entity}) =>
    entity === null ? document.createTextNode(text) : phraseOf(text, entity, answer)));
  byId("found").replaceChildren(...answer.entities.map((entity, number) => {
    const item = made("li", colour(number));
    item.dataset.entity = number;
    item.append(made("b", "", nameOf(entity.name)));
    item.append(...entity.boxes.map((box) => made("span", "", inNumbers(box))));
    return item;
  }));
  byId("notes").textContent = notesOf(answer).join(" ");
  byId("raw-prompt").textContent = answer.prompt;
  byId("raw-written").textContent = answer.written;
  for (const element of byId("answer").querySelectorAll("[data-entity]")) listen(element);
  choose(null);
  byId("answer").hidden = false;
  byId("answer").scrollIntoView({block: "nearest"});
}

function notesOf(answer) {
  const notes = [`${answer.num_tokens} tokens in ${answer.seconds.toFixed(1)} s.`];
  if (!answer.is_whole) notes.push("The text ends at the most tokens allowed.");
  if (answer.num_malformed) {
    notes.push(`Not drawn, since not well-formed: ${answer.num_malformed}.`);
  }
  if (facts.grounds && !answer.entities.length && !answer.prompt.includes("<grounding>")) {
    notes.push("Without <grounding> in the prompt the model seldom writes boxes.");
  }
  return notes;
}

function nameOf(name) {
  return name.startsWith("<patch_index_") ? "a box without a phrase" : name;
}

function phraseOf(text, number, answer) {
  const phrase = made("span", `phrase ${colour(number)}`, text || "▢");
  const {name, boxes} = answer.entities[number];
  phrase.dataset.entity = number;
  phrase.tabIndex = 0;
  phrase.setAttribute("role", "button");
  phrase.setAttribute("aria-pressed", "false");
  phrase.setAttribute("aria-label", `${nameOf(name)}, ${boxes.length === 1 ? "box" : "boxes"} ` +
    boxes.map(inWords).join("; "));
  phrase.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    phrase.click();
  });
  return phrase;
}

function boxOf(number, {left, top, right, bottom}) {
  const element = made("div", `box ${colour(number)}`);
  element.dataset.entity = number;
  Object.assign(element.style, {
    left: `${left * 100}%`, top: `${top * 100}%`,
    width: `${(right - left) * 100}%`, height: `${(bottom - top) * 100}%`,
  });
  return element;
}

function labelOf(name, number, {left, top, right}) {
  const element = made("span", `name ${colour(number)}`, nameOf(name));
  element.dataset.entity = number;
  element.classList.toggle("high", top < 0.08); // no room above the picture
  element.style.top = `${top * 100}%`;
  if (left > 0.5) element.style.right = `${(1 - right) * 100}%`;
  else element.style.left = `${left * 100}%`;
  return element;
}

function listen(element) {
  const number = Number(element.dataset.entity);
  element.addEventListener("pointerenter", () => choose(number));
  element.addEventListener("pointerleave", () => choose(pinned));
  element.addEventListener("focus", () => choose(number));
  element.addEventListener("blur", () => choose(pinned));
  element.addEventListener("click", () => {
    pinned = pinned === number ? null : number;
    choose(pinned);
  });
}

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  pinned = null;
  choose(null);
});

function choose(number) {
  byId("stage").classList.toggle("choosing", number !== null);
  for (const element of byId("answer").querySelectorAll("[data-entity]")) {
    element.classList.toggle("on", Number(element.dataset.entity) === number);
    if (element.hasAttribute("aria-pressed")) {
      element.setAttribute("aria-pressed", Number(element.dataset.entity) === pinned);
    }
  }
}
