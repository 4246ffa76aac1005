document.querySelectorAll("table").forEach(function (table) {
  table.querySelectorAll("th").forEach(function (head, column) {
    head.addEventListener("click", function () {
      var direction = head.dataset.sorted === "-1" ? 1 : -1;
      table.querySelectorAll("th").forEach(function (other) { delete other.dataset.sorted; });
      head.dataset.sorted = direction;
      var value = function (row) {
        var cell = row.cells[column];
        return cell.dataset.v === undefined ? cell.textContent : Number(cell.dataset.v);
      };
      var body = table.tBodies[0];
      Array.from(body.rows).sort(function (a, b) {
        var x = value(a), y = value(b);
        return (x < y ? -1 : x > y ? 1 : 0) * direction;
      }).forEach(function (row) { body.appendChild(row); });
    });
  });
});
document.documentElement.dataset.ready = "yes";
