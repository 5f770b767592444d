// The search page: sends the form, and shows the answer. Texts are set as text, so none of them becomes markup.
"use strict";
const at = (id) => document.getElementById(id);
const make = (tag, text) => Object.assign(document.createElement(tag), { textContent: text });

function shown(result) {
  const item = document.createElement("li");
  if (result.pictured) {
    const picture = Object.assign(new Image(), { src: `picture/${result.id}`, alt: result.text || result.name });
    picture.onerror = () => picture.replaceWith(make("p", "The picture is not there any more."));
    item.append(picture);
  } else item.append(make("p", result.text));
  item.append(make("b", result.score.toFixed(3)), " ", make("span", result.name));
  if (result.rewrite) item.append(make("small", result.rewrite));
  return item;
}

function show(answer) {
  at("rewrite").textContent = answer.rewrite;
  at("adaptive").textContent = answer.adaptive;
  for (const column of answer.columns) {
    const [note, list] = at(column.pair).querySelectorAll(".times, ol");
    const times = `query ${column.encode_ms.toFixed(1)} ms, search ${column.search_ms.toFixed(2)} ms`;
    note.textContent = column.missing || times;
    list.replaceChildren(...column.results.map(shown));
  }
  at("answer").hidden = false;
}

async function ask(event) {
  event.preventDefault();
  const button = event.submitter || at("ask").querySelector("button");
  button.disabled = true;
  at("error").textContent = "";
  at("status").textContent = "Searching";
  try {
    const reply = await fetch("search", { method: "POST", body: new FormData(at("ask")) });
    const answer = await reply.json().catch(() => ({ error: `The server answered ${reply.status}.` }));
    if (reply.ok) show(answer);
    at("error").textContent = reply.ok ? "" : answer.error;
    at("status").textContent = reply.ok ? "Found" : "";
  } catch {
    at("status").textContent = "";
    at("error").textContent = "The server does not answer. Is `rime demo` still running?";
  }
  button.disabled = false;
}

function chosen() {
  const [file] = at("file").files;
  URL.revokeObjectURL(at("preview").src);
  at("preview").hidden = !file?.type.startsWith("image/");
  if (!at("preview").hidden) at("preview").src = URL.createObjectURL(file);
  at("clear").hidden = !file;
}

function take(event, data) {
  if (!data?.files.length) return;
  event.preventDefault();
  at("file").files = data.files;
  chosen();
}

at("ask").addEventListener("submit", ask);
at("file").addEventListener("change", chosen);
at("clear").addEventListener("click", () => { at("file").value = ""; chosen(); at("file").focus(); });
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => { event.preventDefault(); take(event, event.dataTransfer); });
document.addEventListener("paste", (event) => take(event, event.clipboardData));
