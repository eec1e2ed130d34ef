"use strict";
// Draws the GLBs that this service writes with WebGL 2: one mesh, one metallic-roughness material, a studio light.
// Drag or arrow keys turn it, + and - (or the wheel, once it has the focus) come closer.
const VERTEX = `#version 300 es
in vec3 position; in vec3 normal; in vec4 tangent; in vec2 uv;
uniform mat4 clipFromWorld;
out vec3 at; out vec3 n; out vec4 t; out vec2 st;
void main() { at = position; n = normal; t = tangent; st = uv; gl_Position = clipFromWorld * vec4(position, 1.0); }`;

const FRAGMENT = `#version 300 es
precision highp float;
in vec3 at; in vec3 n; in vec4 t; in vec2 st;
uniform vec3 eye; uniform mat3 worldFromCamera; uniform bvec3 has; // normals, textures, normal map
uniform sampler2D baseColor; uniform sampler2D orm; uniform sampler2D bumps;
out vec4 color;
vec3 sky(vec3 d, float rough) {
  float up = smoothstep(-0.4 - rough, 0.5 + rough, d.y);
  return mix(vec3(0.32, 0.30, 0.28), vec3(1.05, 1.08, 1.12), up);
}
vec3 lit(vec3 N, vec3 V, vec3 L, vec3 diffuse, vec3 F0, float a) { // GGX with Smith's height-correlated visibility
  vec3 H = normalize(L + V);
  float nl = max(dot(N, L), 0.0), nv = max(dot(N, V), 1e-3), nh = max(dot(N, H), 0.0), vh = max(dot(V, H), 0.0);
  float d = nh * nh * (a * a - 1.0) + 1.0;
  float D = a * a / (3.14159 * d * d);
  float G = 0.5 / mix(2.0 * nl * nv, nl + nv, a);
  vec3 F = F0 + (1.0 - F0) * pow(1.0 - vh, 5.0);
  return (diffuse / 3.14159 + D * G * F) * nl;
}
void main() {
  vec3 N = has.x ? normalize(n) : normalize(cross(dFdx(at), dFdy(at)));
  if (has.z) {
    vec3 b = texture(bumps, st).xyz * 2.0 - 1.0, T = normalize(t.xyz);
    N = normalize(b.x * T + b.y * t.w * cross(N, T) + b.z * N);
  }
  vec3 V = normalize(eye - at);
  vec3 base = has.y ? texture(baseColor, st).rgb : vec3(0.55), m = has.y ? texture(orm, st).rgb : vec3(1.0, 0.6, 0.0);
  float rough = clamp(m.g, 0.06, 1.0), nv = max(dot(N, V), 0.0);
  vec3 F0 = mix(vec3(0.04), base, m.b), diffuse = base * (1.0 - m.b);
  vec3 F = F0 + (max(vec3(1.0 - rough), F0) - F0) * pow(1.0 - nv, 5.0);
  vec3 c = m.r * (diffuse * sky(N, 1.0) * 0.75 + F * sky(reflect(-V, N), rough) * mix(1.0, 0.7, rough));
  c += 1.9 * lit(N, V, normalize(worldFromCamera * vec3(0.6, 0.8, 0.9)), diffuse, F0, rough * rough);
  c += 0.5 * lit(N, V, normalize(worldFromCamera * vec3(-0.9, 0.2, 0.4)), diffuse, F0, rough * rough);
  color = vec4(pow(clamp(c, 0.0, 1.0), vec3(1.0 / 2.2)), 1.0);
}`;

function parseGlb(buffer) {
  const view = new DataView(buffer);
  if (buffer.byteLength < 20 || view.getUint32(0, true) !== 0x46546c67) throw new Error("This is no GLB.");
  const length = view.getUint32(12, true);
  const gltf = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 20, length)));
  const bytes = (index) => {
    const part = gltf.bufferViews[index];
    const start = 28 + length + (part.byteOffset || 0);
    return buffer.slice(start, start + part.byteLength);
  };
  const array = (index) => {
    const accessor = gltf.accessors[index];
    const kind = { 5121: Uint8Array, 5123: Uint16Array, 5125: Uint32Array, 5126: Float32Array }[accessor.componentType];
    const size = { SCALAR: 1, VEC2: 2, VEC3: 3, VEC4: 4 }[accessor.type];
    return new kind(bytes(accessor.bufferView), accessor.byteOffset || 0, accessor.count * size);
  };
  const image = async (texture) => {
    if (!texture) return null;
    const source = gltf.images[gltf.textures[texture.index].source];
    const blob = new Blob([bytes(source.bufferView)], { type: source.mimeType });
    return createImageBitmap(blob, { premultiplyAlpha: "none", colorSpaceConversion: "none" });
  };
  return { gltf, array, image };
}

class Viewer {
  constructor(canvas) {
    const gl = (this.gl = canvas.getContext("webgl2", { alpha: true, antialias: true }));
    if (!gl) throw new Error("This browser has no WebGL 2.");
    this.canvas = canvas;
    this.program = this.link();
    this.made = [];
    this.count = 0;
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    Object.assign(this, { turn: 0.6, tilt: 0.3, zoom: 1, spinning: !still, asked: false });
    let from = null;
    canvas.addEventListener("pointerdown", (e) => { from = [e.clientX, e.clientY]; canvas.setPointerCapture(e.pointerId); });
    canvas.addEventListener("pointerup", () => (from = null));
    canvas.addEventListener("pointercancel", () => (from = null));
    canvas.addEventListener("pointermove", (e) => {
      if (!from) return;
      this.move(-(e.clientX - from[0]) * 0.01, (e.clientY - from[1]) * 0.01, 1);
      from = [e.clientX, e.clientY];
    });
    canvas.addEventListener("wheel", (e) => {
      if (document.activeElement !== canvas) return; // else the page could not be scrolled past it
      e.preventDefault();
      this.move(0, 0, Math.exp(e.deltaY * 0.001));
    }, { passive: false });
    canvas.addEventListener("keydown", (e) => {
      const step = { ArrowLeft: [0.15, 0, 1], ArrowRight: [-0.15, 0, 1], ArrowUp: [0, 0.15, 1], ArrowDown: [0, -0.15, 1],
        "+": [0, 0, 0.9], "=": [0, 0, 0.9], "-": [0, 0, 1.1] }[e.key];
      if (!step) return;
      e.preventDefault();
      this.move(...step);
    });
    new ResizeObserver(() => this.ask()).observe(canvas);
  }

  link() {
    const gl = this.gl, program = gl.createProgram();
    for (const [kind, text] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
      const shader = gl.createShader(kind);
      gl.shaderSource(shader, text);
      gl.compileShader(shader);
      gl.attachShader(program, shader);
    }
    ["position", "normal", "tangent", "uv"].forEach((name, i) => gl.bindAttribLocation(program, i, name));
    gl.linkProgram(program);
    if (!gl.getProgramParameter(program, gl.LINK_STATUS)) throw new Error("The shaders cannot be used here.");
    return program;
  }

  move(turn, tilt, zoom) {
    this.spinning = false;
    this.turn += turn;
    this.tilt = Math.max(-1.5, Math.min(1.5, this.tilt + tilt));
    this.zoom = Math.max(0.3, Math.min(3, this.zoom * zoom));
    this.ask();
  }

  async show(buffer) {
    const { gltf, array, image } = parseGlb(buffer);
    const primitive = gltf.meshes[0].primitives[0];
    const material = (gltf.materials || [])[primitive.material] || {};
    const pbr = material.pbrMetallicRoughness || {};
    const [base, orm, bumps] = await Promise.all(
      [pbr.baseColorTexture, pbr.metallicRoughnessTexture, material.normalTexture].map(image));
    const gl = this.gl, attributes = primitive.attributes;
    this.clear();
    ["POSITION", "NORMAL", "TANGENT", "TEXCOORD_0"].forEach((name, i) => {
      if (attributes[name] === undefined) return gl.disableVertexAttribArray(i);
      this.upload(gl.ARRAY_BUFFER, array(attributes[name]));
      gl.enableVertexAttribArray(i);
      gl.vertexAttribPointer(i, { POSITION: 3, NORMAL: 3, TANGENT: 4, TEXCOORD_0: 2 }[name], gl.FLOAT, false, 0, 0);
    });
    const indices = Uint32Array.from(array(primitive.indices));
    this.upload(gl.ELEMENT_ARRAY_BUFFER, indices);
    const position = gltf.accessors[attributes.POSITION];
    this.center = position.min.map((low, k) => (low + position.max[k]) / 2);
    this.radius = Math.hypot(...position.min.map((low, k) => position.max[k] - low)) / 2 || 1;
    gl.useProgram(this.program);
    [base, orm, bumps].forEach((picture, i) => this.texture(i, picture, i === 0));
    ["baseColor", "orm", "bumps"].forEach((name, i) => gl.uniform1i(gl.getUniformLocation(this.program, name), i));
    gl.uniform3i(gl.getUniformLocation(this.program, "has"), attributes.NORMAL !== undefined, !!(base && orm),
      !!bumps && attributes.TANGENT !== undefined);
    this.count = indices.length;
    this.ask();
  }

  upload(target, data) {
    const buffer = this.gl.createBuffer();
    this.gl.bindBuffer(target, buffer);
    this.gl.bufferData(target, data, this.gl.STATIC_DRAW);
    this.made.push(() => this.gl.deleteBuffer(buffer));
  }

  texture(unit, picture, srgb) {
    const gl = this.gl, texture = gl.createTexture();
    gl.activeTexture(gl.TEXTURE0 + unit);
    gl.bindTexture(gl.TEXTURE_2D, texture);
    this.made.push(() => gl.deleteTexture(texture));
    const source = picture || new ImageData(1, 1);
    gl.texImage2D(gl.TEXTURE_2D, 0, srgb ? gl.SRGB8_ALPHA8 : gl.RGBA8, gl.RGBA, gl.UNSIGNED_BYTE, source);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MIN_FILTER, gl.LINEAR_MIPMAP_LINEAR);
    gl.generateMipmap(gl.TEXTURE_2D);
  }

  clear() {
    this.made.splice(0).forEach((free) => free());
    this.count = 0;
  }

  ask() {
    if (this.asked || !this.count) return;
    this.asked = true;
    requestAnimationFrame((now) => { this.asked = false; this.draw(now); });
  }

  draw(now) {
    const gl = this.gl, canvas = this.canvas;
    if (!this.count || !canvas.clientWidth) return;
    if (this.spinning) this.turn += 0.0004 * Math.min(50, now - (this.last || now));
    this.last = now;
    const width = Math.round(canvas.clientWidth * Math.min(2, devicePixelRatio));
    const height = Math.round(canvas.clientHeight * Math.min(2, devicePixelRatio));
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    const away = [Math.cos(this.tilt) * Math.sin(this.turn), Math.sin(this.tilt), Math.cos(this.tilt) * Math.cos(this.turn)];
    const right = [Math.cos(this.turn), 0, -Math.sin(this.turn)];
    const up = [away[1] * right[2], away[2] * right[0] - away[0] * right[2], -away[1] * right[0]];
    const focal = 1 / Math.tan(0.35), aspect = width / height, distance = (this.radius * this.zoom) / Math.sin(0.35) / Math.min(1, aspect);
    const eye = this.center.map((c, k) => c + away[k] * distance);
    const near = Math.max(distance - this.radius, 0.01 * this.radius) * 0.9, far = distance + this.radius * 1.1;
    const along = (axis) => -(axis[0] * eye[0] + axis[1] * eye[1] + axis[2] * eye[2]);
    const a = (far + near) / (near - far), b = (2 * far * near) / (near - far);
    const columns = [0, 1, 2].map((k) => [(focal / aspect) * right[k], focal * up[k], a * away[k], -away[k]]);
    columns.push([(focal / aspect) * along(right), focal * along(up), a * along(away) + b, -along(away)]);
    gl.viewport(0, 0, width, height);
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
    gl.enable(gl.DEPTH_TEST);
    gl.uniformMatrix4fv(gl.getUniformLocation(this.program, "clipFromWorld"), false, columns.flat());
    gl.uniformMatrix3fv(gl.getUniformLocation(this.program, "worldFromCamera"), false, [...right, ...up, ...away]);
    gl.uniform3fv(gl.getUniformLocation(this.program, "eye"), eye);
    gl.drawElements(gl.TRIANGLES, this.count, gl.UNSIGNED_INT, 0);
    canvas.dataset.drawn = "yes";
    if (this.spinning) this.ask();
  }
}
