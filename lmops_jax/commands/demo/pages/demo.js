// What the pages of all demos share: the server's answers, its sentences, and the wait for them.
// A page has elements with the ids error, go (the button that asks), status and clock.

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

// While it is on, nothing more can be asked and the seconds are counted.
export function wait(on) {
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
