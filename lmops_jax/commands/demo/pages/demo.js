// What the pages of all demos share: the server's answers, its sentences, and the wait for them.
// A page has elements with the ids prompt, error, go (the button that asks), status, clock, written
// (what is written before the answer is there) and answer.

let timer = null;

export function byId(id) {
  return document.getElementById(id);
}

// A new element.
export function made(tag, className, text) {
  const element = document.createElement(tag);
  element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

// Shows a sentence about what went wrong; none for "".
export function showError(sentence) {
  byId("error").textContent = sentence;
  byId("error").hidden = !sentence;
  if (sentence) byId("error").scrollIntoView({block: "nearest"});
}

// The JSON that the server answers; an Error has a sentence for the person. `written` gets what is
// written so far, if the server is asked for lines.
export async function asked(path, options, written) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("The demo does not answer; see whether its terminal still runs it.");
  }
  let found;
  try {
    const lines = response.headers.get("Content-Type") === "application/x-ndjson";
    found = lines ? await lastOf(response, written) : await response.json();
  } catch {
    throw new Error(`The demo answered ${response.status} and nothing that can be read.`);
  }
  if (found.error) throw new Error(found.error);
  return found;
}

// The answer, or the error, in the last of the server's lines.
async function lastOf(response, written) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let text = "";
  for (;;) {
    const {done, value} = await reader.read();
    if (done) throw new Error("The lines end without an answer.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const found = JSON.parse(line);
      if (found.text === undefined) return found.answer || found;
      text += found.text;
      written(text);
    }
  }
}

// The contents of a file.
export function base64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new Error(`${file.name} cannot be read; choose it again.`));
    reader.readAsDataURL(file);
  });
}

// Fields of a form with the values that the facts have for them.
export function fill(form, {defaults, max_length: maxLength}) {
  for (const [name, value] of Object.entries(defaults)) {
    const field = form.elements[name];
    if (field.type === "checkbox") field.checked = value;
    else field.value = value;
  }
  form.elements.max_new_tokens.max = maxLength;
}

// The numbers of a form that can be asked for, by name.
export function numbersOf(form) {
  const fields = [...form.querySelectorAll("input[type=number]:enabled")];
  return Object.fromEntries(fields.map((field) => [field.name, field.valueAsNumber]));
}

// The answer to a request; `written` gets what is written so far.
export function answered(request, written) {
  const headers = {"Content-Type": "application/json", Accept: "application/x-ndjson"};
  return asked("/answer", {method: "POST", headers, body: JSON.stringify(request)}, written);
}

// Lives: `begin` once, and `ask` whenever the form is sent and no answer is under way.
export function begins(form, begin, ask) {
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (byId("go").disabled) return;
    showError("");
    wait(true);
    try {
      await ask();
    } catch (error) {
      byId("answer").hidden = true;
      showError(error.message);
    }
    byId("written").textContent = "";
    wait(false);
  });
  begin().catch((error) => showError(error.message));
}

// While it is on, nothing more can be asked and the seconds are counted.
function wait(on) {
  const begun = performance.now();
  const tick = () => {
    byId("clock").textContent = `${Math.floor((performance.now() - begun) / 1000)} s`;
  };
  byId("go").disabled = on;
  byId("status").textContent = on ? "Working; a first answer of its kind takes longer." : "";
  clearInterval(timer);
  byId("clock").textContent = "";
  if (on) timer = setInterval(tick, 1000);
}
