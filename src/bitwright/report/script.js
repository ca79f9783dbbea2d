"use strict";
(function () {
  // light and dark
  var root = document.documentElement, button = document.getElementById("scheme");
  var system = matchMedia("(prefers-color-scheme: dark)");
  function kept(value) {
    try {
      if (value !== undefined) localStorage.setItem("bitwright-scheme", value);
      return localStorage.getItem("bitwright-scheme");
    } catch (error) { return null; }
  }
  function dark() {
    var chosen = root.getAttribute("data-scheme");
    return chosen ? chosen === "dark" : system.matches;
  }
  function show() {
    button.textContent = dark() ? "Light" : "Dark";
    button.setAttribute("aria-label", dark() ? "Show in light colours" : "Show in dark colours");
    button.setAttribute("aria-pressed", String(dark()));
  }
  var before = kept();
  if (before === "light" || before === "dark") root.setAttribute("data-scheme", before);
  button.hidden = false;
  button.addEventListener("click", function () {
    var next = dark() ? "light" : "dark";
    root.setAttribute("data-scheme", next);
    kept(next);
    show();
  });
  system.addEventListener("change", show);
  show();

  // sorting
  function value(row, column) {
    var cell = row.cells[column], given = cell.getAttribute("data-v");
    return given === null ? cell.textContent.trim() : Number(given);
  }
  function empty(item) { return item === "" || item === "–"; }
  function compare(a, b) {
    if (typeof a === "number" && typeof b === "number") return a - b;
    return String(a).localeCompare(String(b), "en", { numeric: true });
  }
  function sort(table, column) {
    var head = table.tHead.rows[0].cells, body = table.tBodies[0], cell = head[column];
    var now = cell.getAttribute("aria-sort");
    var order = now === "ascending" ? "descending" : "ascending";
    Array.prototype.forEach.call(head, function (other) { other.removeAttribute("aria-sort"); });
    cell.setAttribute("aria-sort", order);
    var rows = Array.prototype.slice.call(body.rows).map(function (row) { return [value(row, column), row]; });
    rows.sort(function (one, other) {
      var a = one[0], b = other[0];
      if (empty(a) || empty(b)) return Number(empty(a)) - Number(empty(b));
      return order === "ascending" ? compare(a, b) : compare(b, a);
    });
    rows.forEach(function (pair) { body.appendChild(pair[1]); });
  }
  document.querySelectorAll("table.sortable").forEach(function (table) {
    Array.prototype.forEach.call(table.tHead.rows[0].cells, function (cell, column) {
      var head = cell.querySelector("button");
      if (head) head.addEventListener("click", function () { sort(table, column); });
    });
  });

  // searching
  document.querySelectorAll("input[data-table]").forEach(function (input) {
    var rows = document.getElementById(input.getAttribute("data-table")).tBodies[0].rows;
    var found = input.closest(".search").querySelector(".found");
    input.addEventListener("input", function () {
      var wanted = input.value.toLowerCase().split(/\s+/).filter(Boolean), count = 0;
      Array.prototype.forEach.call(rows, function (row) {
        var text = row.textContent.toLowerCase();
        row.hidden = !wanted.every(function (word) { return text.indexOf(word) >= 0; });
        if (!row.hidden) count += 1;
      });
      found.textContent = count + " of " + rows.length;
    });
  });
})();
