"use strict";
// Asks the server again and again whether the page has changed, and puts in what has, so that nothing that the reader has
// chosen is lost: only articles whose text is another are replaced, and their drop-downs and folds stand as before.
(function () {
  const pause = 1000 * Number(document.body.dataset.live);
  const connection = document.getElementById("connection");
  let sources = collected(document);
  let tag = "";

  function collected(page) { // articles as they were sent, before figures are drawn in them
    const found = new Map();
    page.querySelectorAll("article[id]").forEach(function (article) { found.set(article.id, article.outerHTML); });
    return found;
  }

  function named(select) {
    return select.dataset.figure + "/" + select.dataset.number;
  }

  function folded(details) {
    const article = details.closest("article");
    return (article ? article.id : "") + "/" + details.querySelector("summary").textContent;
  }

  function kept(element) {
    const choices = new Map(), folds = new Map();
    element.querySelectorAll("select[data-figure]").forEach(function (select) {
      choices.set(named(select), select.options[select.selectedIndex].text);
    });
    element.querySelectorAll("details").forEach(function (details) { folds.set(folded(details), details.open); });
    return { choices: choices, folds: folds };
  }

  function restore(element, state) {
    element.querySelectorAll("select[data-figure]").forEach(function (select) {
      const wanted = state.choices.get(named(select));
      Array.from(select.options).forEach(function (option, index) {
        if (option.text === wanted) select.selectedIndex = index;
      });
    });
    element.querySelectorAll("details").forEach(function (details) {
      const open = state.folds.get(folded(details));
      if (open !== undefined) details.open = open;
    });
  }

  function replace(old, made) {
    const state = kept(old);
    if (window.Plotly) old.querySelectorAll(".figure").forEach(function (figure) { Plotly.purge(figure); });
    old.replaceWith(made);
    restore(made, state);
  }

  function put(page) {
    const renewed = collected(page);
    const alike = Array.from(renewed.keys()).join() === Array.from(sources.keys()).join();
    document.title = page.title;
    replace(document.querySelector("header"), page.querySelector("header"));
    replace(document.querySelector("nav"), page.querySelector("nav"));
    if (!alike) replace(document.querySelector("main"), page.querySelector("main"));
    else renewed.forEach(function (source, name) {
      if (source !== sources.get(name)) replace(document.getElementById(name), page.getElementById(name));
    });
    document.getElementById("drawings").textContent = page.getElementById("drawings").textContent;
    sources = renewed;
    document.dispatchEvent(new Event("renewed"));
  }

  function say(text) {
    connection.textContent = text;
    connection.hidden = text === "";
  }

  async function look() {
    try {
      const answer = await fetch(location.pathname, { headers: { "If-None-Match": tag }, cache: "no-store" });
      if (answer.status === 200) {
        const top = window.scrollY, text = await answer.text();
        tag = answer.headers.get("ETag");
        put(new DOMParser().parseFromString(text, "text/html"));
        window.scrollTo(0, top);
      }
      if (answer.status === 403) say("The server was started anew; open the address that it has printed.");
      else say("");
    } catch (error) {
      if (!(error instanceof TypeError)) throw error; // as it is where the server does not answer
      say("The server does not answer; what stands here may be old.");
    } finally {
      window.setTimeout(look, pause);
    }
  }

  window.setTimeout(look, pause);
})();
