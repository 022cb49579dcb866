// The page of `lmops demo promptist`: asks with a prompt, and shows prompts and pictures.

import {answered, asked, begins, byId, fill, made, numbersOf, showError} from "/demo.js";

const form = byId("ask");
let facts = null;

async function begin() {
  facts = await asked("/facts");
  const {draws} = facts;
  byId("facts").textContent = `${facts.model}, a model of the family ${facts.family} with ` +
    `${facts.parameters} parameters, on ${facts.device}. ` +
    (draws ? `${draws.model} draws pictures of ${draws.height} × ${draws.width} pixels.`
      : "No pictures are drawn; start the demo with --images for them.");
  byId("drawing").hidden = !draws;
  byId("drawing").disabled = !draws;
  byId("go").textContent = draws ? "Rewrite and draw" : "Rewrite";
  fill(form, facts);
}

begins(form, begin, async () => {
  const request = {prompt: byId("prompt").value, ...numbersOf(form)};
  show(await answered(request, (text) => {
    byId("written").textContent = text;
  }));
});

function show({prompt, rewrites, seconds}) {
  byId("pairs").replaceChildren(
    figure("Your prompt", prompt, prompt.text),
    ...rewrites.map((one, i) => figure(
      rewrites.length > 1 ? `Rewritten ${i + 1}` : "Rewritten", one, prompt.text)));
  byId("notes").textContent = `${seconds.toFixed(1)} s.`;
  byId("answer").hidden = false;
  byId("answer").scrollIntoView({block: "nearest"});
}

// A prompt with its picture; words that are added to the user's stand out.
function figure(title, one, users) {
  const {text, picture} = one;
  const element = made("figure", "pair");
  if (picture && picture.png) {
    const image = made("img", "");
    image.src = `data:image/png;base64,${picture.png}`;
    image.width = facts.draws.width;
    image.height = facts.draws.height;
    image.alt = `Picture of: ${text}`;
    element.append(image);
  }
  const caption = made("figcaption", "");
  const words = made("p", "prompt");
  if (text !== users && text.startsWith(users)) {
    words.append(made("span", "of-prompt", users), made("span", "added", text.slice(users.length)));
  } else {
    words.textContent = text;
  }
  caption.append(made("h3", "", title), words);
  caption.append(...notesOf(one).map((note) => made("p", "note", note)));
  element.append(caption);
  return element;
}

function notesOf({picture, is_unchanged: isUnchanged, is_whole: isWhole}) {
  const notes = [];
  if (isUnchanged) notes.push("The policy wrote nothing; this is the prompt as it was.");
  if (isWhole === false) notes.push("The text ends at the most tokens allowed.");
  if (picture && picture.cut) {
    notes.push(`Too long for the text encoder; this end is not drawn: “${picture.cut}”`);
  }
  if (picture && !picture.png) {
    notes.push("The picture came out with numbers that are not finite; try --dtype float32.");
  }
  return notes;
}
