// Clips side by side: each is one picture of all its frames, drawn frame by frame to a canvas, so that all are in step.

const clock = { frame: 0, playing: !matchMedia("(prefers-reduced-motion: reduce)").matches, speed: 1, last: 0 };
const frames = Math.max(1, ...data.sheets.map((sheet) => sheet.frames));
const pictures = new Map();
const TRAIL = 12;
let players = [];

const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    entry.target.player.visible = entry.isIntersecting;
    if (entry.isIntersecting) entry.target.player.draw();
  }
}, { rootMargin: "200px" });

class Player {
  constructor(sheet, paths, label) {
    this.sheet = data.sheets[sheet];
    this.number = sheet;
    this.paths = paths;
    this.visible = false;
    const small = this.sheet.width <= 128;
    this.canvas = element("canvas", { width: this.sheet.width * (small ? 4 : 1), height: this.sheet.height * (small ? 4 : 1),
      class: small ? "small" : false, role: "img", "aria-label": label });
    this.canvas.player = this;
    watcher.observe(this.canvas);
  }

  draw() {
    const view = at("view").value, picture = pictureOf(this.number, view, () => this.draw());
    if (!picture) return;
    const pen = this.canvas.getContext("2d"), sheet = this.sheet;
    const frame = Math.min(Math.floor(clock.frame), sheet.frames - 1);
    const wide = picture.naturalWidth / sheet.columns, high = picture.naturalHeight / Math.ceil(sheet.frames / sheet.columns);
    pen.imageSmoothingEnabled = view === "src" && this.canvas.width === sheet.width;
    pen.drawImage(picture, (frame % sheet.columns) * wide, Math.floor(frame / sheet.columns) * high,
      wide, high, 0, 0, this.canvas.width, this.canvas.height);
    this.canvas.dataset.frame = frame;
    if (at("tracks").checked) this.drawPaths(pen, Math.floor(clock.frame));
  }

  // Paths are (y, x) in tenths of the clip's own pixels; a pixel's centre is at whole numbers.
  drawPaths(pen, frame) {
    const scale = this.canvas.width / this.sheet.pixels;
    const place = ([y, x]) => [(x / 10 + 0.5) * scale, (y / 10 + 0.5) * scale];
    pen.lineWidth = Math.max(1.5, this.canvas.width / 200);
    this.paths.forEach((path, index) => {
      pen.strokeStyle = pen.fillStyle = `hsl(${(index * 137) % 360} 90% 55%)`;
      pen.beginPath();
      let open = false;
      for (let i = Math.max(0, frame - TRAIL); i <= Math.min(frame, path.length - 1); i++) {
        if (path[i]) pen[open ? "lineTo" : "moveTo"](...place(path[i]));
        open = path[i] !== null;
      }
      pen.stroke();
      if (path[frame]) {
        pen.beginPath();
        pen.arc(...place(path[frame]), pen.lineWidth * 1.6, 0, 7);
        pen.fill();
      }
    });
  }
}

// A picture of a sheet, its frames or its displacements, or null while it is read; `ready` is called when it is there.
function pictureOf(number, view, ready) {
  const key = `${view} ${number}`;
  let picture = pictures.get(key);
  if (!picture) {
    picture = new Image();
    picture.waiting = [];
    picture.onload = () => { picture.waiting.splice(0).forEach((call) => call()); };
    picture.src = data.sheets[number][view];
    pictures.set(key, picture);
  }
  if (picture.complete && picture.naturalWidth) return picture;
  picture.waiting.push(ready);
  return null;
}

function drawFrame() {
  const frame = Math.floor(clock.frame);
  at("scrub").value = frame;
  at("frame").textContent = `${frame + 1}/${frames}`;
  players.filter((player) => player.visible).forEach((player) => player.draw());
}

function tick(now) {
  if (clock.playing) {
    const before = Math.floor(clock.frame);
    clock.frame = (clock.frame + Math.min(now - clock.last, 250) / 1000 * data.fps * clock.speed) % frames;
    if (Math.floor(clock.frame) !== before) drawFrame();
  }
  clock.last = now;
  requestAnimationFrame(tick);
}

function setPlaying(playing) {
  clock.playing = playing;
  at("play").textContent = playing ? "Pause" : "Play";
}

function goTo(frame) {
  setPlaying(false);
  clock.frame = (frame + frames) % frames;
  drawFrame();
}

function startPlaying() {
  at("scrub").max = frames - 1;
  at("play").addEventListener("click", () => setPlaying(!clock.playing));
  at("scrub").addEventListener("input", () => goTo(Number(at("scrub").value)));
  at("speed").addEventListener("change", () => { clock.speed = Number(at("speed").value); });
  at("tracks").addEventListener("change", drawFrame);
  at("view").addEventListener("change", () => { at("wheel").hidden = at("view").value === "src"; drawFrame(); });
  at("wheel").title = `where things move next, full colour at ${shown(data.speed)} pixels a frame`;
  document.addEventListener("keydown", (event) => {
    if (/^(input|select|textarea|button|summary)$/i.test(event.target.tagName)) return;
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step) goTo(Math.floor(clock.frame) + step);
    if (event.key === " ") { event.preventDefault(); setPlaying(!clock.playing); }
  });
  setPlaying(clock.playing);
  requestAnimationFrame(tick);
}
