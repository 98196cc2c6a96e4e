// @ts-check
/**
 * KalamDB for browsers and other JavaScript: one module, no dependencies.
 *
 *     import { connect } from "/kalamdb.js";
 *     const db = connect();                                  // the server this page came from
 *     await db.login("anna", "secret");
 *     const notes = await db.query("SELECT * FROM app.notes WHERE pinned = $1", [true]);
 *     const live = db.subscribe("SELECT * FROM app.notes", { onRows: (rows) => render(rows) });
 *
 * One socket carries all subscriptions of a client. When it is lost it is opened again, and each
 * subscription goes on after the last change that it saw.
 */

/** @typedef {string | number | boolean | null | bigint | Date} Param A value for $1, $2, ... */
/** @typedef {Record<string, any>} Row A row by column name. */
/**
 * @typedef {object} Field One column of a result.
 * @property {string} name
 * @property {any} data_type As on the wire: "BigInt", "Text", {Decimal: {precision, scale}}, ...
 * @property {number} index
 * @property {string[]} [flags] Of "pk", "nn", "uq".
 */
/**
 * @typedef {object} Result What one statement gave.
 * @property {Row[]} rows
 * @property {Field[]} schema
 * @property {number} rowCount Rows returned, or written.
 * @property {string | null} message
 * @property {string | null} asUser Whose rows were meant.
 */
/**
 * @typedef {object} Change
 * @property {"insert" | "update" | "delete"} type
 * @property {Row | null} row The new version; null for a delete.
 * @property {Row | null} old What it replaced: the changed columns of an update, the whole row of a delete.
 */
/**
 * @typedef {object} SubscribeOptions
 * @property {boolean} [snapshot] Whether the present rows come first; yes unless it is false.
 * @property {number} [lastRows] Only the newest rows come first, this many.
 * @property {number} [batchSize] Rows of one batch of the snapshot.
 * @property {string | number | bigint} [from] Only what changed after this `_seq`.
 * @property {(rows: Row[], subscription: Subscription) => void} [onRows] All rows that match now, by key; after each change.
 * @property {(change: Change, subscription: Subscription) => void} [onChange] Each change.
 * @property {(rows: Row[], subscription: Subscription) => void} [onSnapshot] Each batch of the snapshot.
 * @property {(subscription: Subscription) => void} [onReady] The snapshot is complete; again after each reconnect.
 * @property {(error: KalamDbError, subscription: Subscription) => void} [onError] The subscription has ended.
 */
/**
 * @typedef {object} ConnectOptions
 * @property {string} [token] An access token; else call login().
 * @property {string} [namespace] For tables without one.
 * @property {number} [timeoutMs] Of a request; 30,000.
 * @property {number} [reconnectMs] First pause before a lost socket is opened again; doubles up to 30 s. 100.
 * @property {boolean} [raw] Values as on the wire instead of JavaScript's own.
 * @property {typeof fetch} [fetch]
 * @property {typeof WebSocket} [WebSocket]
 * @property {(state: "offline" | "connecting" | "online") => void} [onState] The state of the socket.
 */

const PING_MS = 5_000;
const RECONNECT_MAX_MS = 30_000;

/** What the server refused, or what kept it from answering. */
export class KalamDbError extends Error {
  /**
   * @param {string} code As TOKEN_EXPIRED, PERMISSION_DENIED, SQL_EXECUTION_ERROR, NETWORK, TIMEOUT.
   * @param {string} message
   * @param {number} [status] Of HTTP, 0 without an answer.
   * @param {string} [details]
   */
  constructor(code, message, status = 0, details) {
    super(message);
    this.name = "KalamDbError";
    this.code = code;
    this.status = status;
    this.details = details;
  }
}

/**
 * A client of the server at `url`; nothing is sent before the first call.
 * @param {string} [url] Base address; that of the page when it is left out.
 * @param {ConnectOptions} [options]
 * @returns {Client}
 */
export function connect(url, options = {}) {
  return new Client(url ?? globalThis.location.origin, options);
}

/** Calls of one server as one user. */
export class Client {
  /** @param {string} url @param {ConnectOptions} [options] */
  constructor(url, options = {}) {
    this.url = url.replace(/\/+$/, "");
    this.options = options;
    /** @type {string | null} */
    this.token = options.token ?? null;
    /** @type {string | null} */
    this.refreshToken = null;
    /** @type {{id: string, role: string, email?: string} | null} */
    this.user = null;
    this._fetch = options.fetch ?? globalThis.fetch.bind(globalThis);
    this._socket = new Socket(this);
    /** @type {Promise<void> | null} */
    this._refreshing = null;
  }

  /**
   * Log in; later calls are this user's.
   * @param {string} user @param {string} password
   * @returns {Promise<{id: string, role: string, email?: string}>}
   */
  async login(user, password) {
    this._adopt(await this._post("/v1/api/auth/login", { user, password }, null));
    return /** @type {any} */ (this.user);
  }

  /**
   * A new token, by the refresh token of the log-in, or by the cookie of an earlier one.
   * Calls that meet an expired token do this by themselves, once.
   * @returns {Promise<void>}
   */
  async refresh() {
    this._refreshing ??= this._post("/v1/api/auth/refresh", {}, this.refreshToken)
      .then((answer) => this._adopt(answer))
      .finally(() => (this._refreshing = null));
    return this._refreshing;
  }

  /** Forget the tokens here and the cookies in the browser; subscriptions end. @returns {Promise<void>} */
  async logout() {
    this.close();
    await this._post("/v1/api/auth/logout", {}, this.token);
    this.token = this.refreshToken = this.user = null;
  }

  /** Who the token belongs to. @returns {Promise<{id: string, role: string, email?: string}>} */
  async me() {
    const answer = await this._authorised(() => this._request("GET", "/v1/api/auth/me", undefined, this.token));
    this.user = answer.user;
    return answer.user;
  }

  /** Whether the server waits for its set-up. @returns {Promise<boolean>} */
  async needsSetup() {
    return (await this._request("GET", "/v1/api/auth/status", undefined, null)).needs_setup;
  }

  /**
   * First set-up: the password of root, and a first administrator. Log in afterwards.
   * @param {{user: string, password: string, root_password: string, email?: string}} setup
   * @returns {Promise<void>}
   */
  async setup(setup) {
    await this._post("/v1/api/auth/setup", setup, null);
  }

  /**
   * Run one or more statements; the last result, with all of them in `.results`.
   * @param {string} sql
   * @param {Param[]} [params] For $1, $2, ...
   * @param {{namespace?: string, idempotencyKey?: string, signal?: AbortSignal, timeoutMs?: number}} [options]
   *   `idempotencyKey`: a repeated write with the same key is answered with the first outcome.
   * @returns {Promise<Result & {results: Result[], took: number}>}
   */
  async execute(sql, params, options = {}) {
    const namespace = options.namespace ?? this.options.namespace;
    const body = {
      sql,
      ...(params?.length ? { params: params.map(wireParam) } : {}),
      ...(namespace ? { namespace_id: namespace } : {}),
    };
    const headers = options.idempotencyKey ? { "Idempotency-Key": options.idempotencyKey } : {};
    const answer = await this._authorised(() =>
      this._request("POST", "/v1/api/sql", body, this.token, headers, options),
    );
    if (answer.status !== "success" || answer.error) throw sqlError(answer.error ?? {}, 200);
    const results = answer.results.map((/** @type {any} */ one) => this._result(one));
    const last = results.at(-1) ?? this._result({ row_count: 0 });
    return { ...last, results, took: answer.took ?? 0 };
  }

  /**
   * The rows of a SELECT.
   * @param {string} sql @param {Param[]} [params] @param {Parameters<Client["execute"]>[2]} [options]
   * @returns {Promise<Row[]>}
   */
  async query(sql, params, options) {
    return (await this.execute(sql, params, options)).rows;
  }

  /**
   * Follow a SELECT over one table: its rows, then each change as it is committed.
   * @param {string} sql @param {SubscribeOptions} [options]
   * @returns {Subscription}
   */
  subscribe(sql, options = {}) {
    const subscription = new Subscription(this, sql, options);
    this._socket.add(subscription);
    return subscription;
  }

  /** End all subscriptions and the socket. Other calls still work. */
  close() {
    this._socket.close();
  }

  /** Close the socket and keep the subscriptions; `resume` continues them. */
  pause() {
    this._socket.pause();
  }

  /** Open the socket again after `pause`. */
  resume() {
    this._socket.resume();
  }

  /** @param {any} answer */
  _adopt(answer) {
    this.token = answer.access_token;
    this.refreshToken = answer.refresh_token ?? this.refreshToken;
    this.user = answer.user;
    this._socket.renew();
  }

  /** @template T @param {() => Promise<T>} call @returns {Promise<T>} */
  async _authorised(call) {
    try {
      return await call();
    } catch (error) {
      if (!(error instanceof KalamDbError) || error.code !== "TOKEN_EXPIRED") throw error;
      await this.refresh();
      return call();
    }
  }

  /** @param {string} path @param {object} body @param {string | null} token */
  _post(path, body, token) {
    return this._request("POST", path, body, token);
  }

  /**
   * @param {string} method @param {string} path @param {object | undefined} body @param {string | null} token
   * @param {Record<string, string>} [headers] @param {{signal?: AbortSignal, timeoutMs?: number}} [options]
   * @returns {Promise<any>}
   */
  async _request(method, path, body, token, headers = {}, options = {}) {
    const timeout = AbortSignal.timeout(options.timeoutMs ?? this.options.timeoutMs ?? 30_000);
    const signal = options.signal ? AbortSignal.any([options.signal, timeout]) : timeout;
    const sent = {
      ...headers,
      ...(token ? { Authorization: `Bearer ${token}` } : {}),
      ...(body === undefined ? {} : { "Content-Type": "application/json" }),
    };
    let response, text;
    try {
      response = await this._fetch(this.url + path, {
        method, headers: sent, signal, credentials: "same-origin",
        body: body === undefined ? undefined : JSON.stringify(body),
      });
      text = await response.text();
    } catch (error) {
      const code = timeout.aborted ? "TIMEOUT" : options.signal?.aborted ? "ABORTED" : "NETWORK";
      throw new KalamDbError(code, `${method} ${path}: ${/** @type {Error} */ (error).message}`);
    }
    const answer = parsed(text);
    if (response.ok && answer !== undefined) return answer;
    const error = answer?.error;
    if (error && typeof error === "object") throw sqlError(error, response.status);
    const code = answer?.code ?? (typeof error === "string" && answer.message ? error : `HTTP_${response.status}`);
    throw new KalamDbError(code, answer?.message ?? error ?? (text.slice(0, 200) || response.statusText), response.status);
  }

  /** @param {any} wire @returns {Result} */
  _result(wire) {
    const schema = wire.schema ?? [];
    return {
      rows: (wire.rows ?? []).map((/** @type {any[]} */ values) => {
        /** @type {Row} */
        const row = {};
        schema.forEach((/** @type {Field} */ field, /** @type {number} */ at) => {
          row[field.name] = this.options.raw ? values[at] : native(values[at], field.data_type);
        });
        return row;
      }),
      schema,
      rowCount: wire.row_count,
      message: wire.message ?? null,
      asUser: wire.as_user ?? null,
    };
  }
}

let subscriptions = 0;

/** A live query. Made by `client.subscribe`; also an async iterator of its changes. */
export class Subscription {
  /** @param {Client} client @param {string} sql @param {SubscribeOptions} options */
  constructor(client, sql, options) {
    this.client = client;
    this.sql = sql;
    this.options = options;
    this.id = `sub-${++subscriptions}`;
    /** @type {Field[]} */
    this.schema = [];
    /** The largest `_seq` seen. @type {bigint | null} */
    this.lastSeq = options.from === undefined ? null : BigInt(options.from);
    /** Where the server was asked to go on: it may send again what came before. @type {bigint | null} */
    this._resumed = this.lastSeq;
    this.ready = false;
    this.closed = false;
    /** @type {KalamDbError | null} */
    this.error = null;
    /** Present rows by key; kept only with `onRows`. @type {Map<string, Row>} */
    this._rows = new Map();
    /** @type {Change[]} */
    this._queue = [];
    /** @type {((value?: any) => void)[]} */
    this._waiting = [];
    this._iterated = false;
  }

  /** The rows that match now, in the order of their keys' arrival; empty without `onRows`. @returns {Row[]} */
  get rows() {
    return [...this._rows.values()];
  }

  /** Ask for no more changes. Idempotent. */
  close() {
    if (this.closed) return;
    this.closed = true;
    this.client._socket.remove(this);
    this._wake();
  }

  /** @returns {AsyncIterator<Change>} */
  async *[Symbol.asyncIterator]() {
    this._iterated = true;
    while (true) {
      const change = this._queue.shift();
      if (change !== undefined) yield change;
      else if (this.error) throw this.error;
      else if (this.closed) return;
      else await new Promise((resolve) => this._waiting.push(resolve));
    }
  }

  /** The `subscribe` message; after a reconnect it continues where the last one ended. */
  _message() {
    const { batchSize, lastRows, snapshot } = this.options;
    // Before it was ready, deletions of rows that came may be missing: it begins where it began.
    if (this.ready) this._resumed = this.lastSeq;
    else if (this._resumed === null) this._forget();
    this.ready = false;
    /** @type {Record<string, any>} */
    const options = batchSize ? { batch_size: batchSize } : {};
    if (this._resumed !== null) options.from = this._resumed.toString();
    else if (lastRows !== undefined) options.last_rows = lastRows;
    const wanted = snapshot !== false || this._resumed !== null;
    return { type: "subscribe", subscription: { id: this.id, sql: this.sql, ...(wanted ? { options } : {}) } };
  }

  /** @param {any} message */
  _receive(message) {
    switch (message.type) {
      case "subscription_ack":
        this.schema = message.schema ?? [];
        // Everything comes again when the server no longer knows what was deleted meanwhile.
        if (message.resumed === false) this._forget();
        if (!message.batch_control.has_more) this._isReady(message);
        break;
      case "initial_data_batch":
        this._snapshot(message);
        break;
      case "change":
        this._change(message);
        break;
      case "error":
        this._end(new KalamDbError(message.code, message.message));
        break;
    }
  }

  _forget() {
    this._rows.clear();
    this._resumed = this.lastSeq = null;
  }

  /** @param {any} message */
  _snapshot(message) {
    const rows = message.rows.filter((/** @type {any} */ wire) => this._isNew(wire)).map((/** @type {any} */ w) => this._row(w));
    for (const row of rows) this._keep(row);
    const control = message.batch_control;
    if (this.options.onSnapshot) this.options.onSnapshot(rows, this);
    if (control.has_more) {
      this.client._socket.send({ type: "next_batch", subscription_id: this.id, last_seq_id: control.last_seq_id });
    } else this._isReady(message);
  }

  /** @param {any} message Says where to go on, whatever was seen. */
  _isReady(message) {
    this.ready = true;
    const seq = BigInt(message.resume_from ?? 0);
    if (seq > (this.lastSeq ?? 0n)) this.lastSeq = seq;
    this.options.onReady?.(this);
    this._changed();
  }

  /** @param {any} message */
  _change(message) {
    const news = message.rows ?? [];
    const olds = message.old_values ?? [];
    for (let at = 0; at < Math.max(news.length, olds.length); at++) {
      if (!this._isNew(news[at] ?? olds[at])) continue;
      const row = news[at] ? this._row(news[at]) : null;
      const old = olds[at] ? this._row(olds[at]) : null;
      const change = { type: message.change_type, row, old };
      if (row) this._keep(row, message.change_type === "update");
      else if (old) this._rows.delete(this._key(old));
      if (this._iterated) this._queue.push(change);
      this.options.onChange?.(change, this);
    }
    this._changed();
    this._wake();
  }

  /** Whether a row was not seen before a reconnect. @param {any} wire */
  _isNew(wire) {
    if (wire?._seq === undefined) return true;
    const seq = BigInt(wire._seq);
    if (this._resumed !== null && seq <= this._resumed) return false;
    if (this.lastSeq === null || seq > this.lastSeq) this.lastSeq = seq;
    return true;
  }

  /** @param {Row} row @param {boolean} [partial] An update leaves out what is NULL. */
  _keep(row, partial = false) {
    if (!this.options.onRows) return;
    if (row._deleted === true) this._rows.delete(this._key(row));
    else if (partial) {
      const empty = Object.fromEntries(this.schema.map((field) => [field.name, null]));
      this._rows.set(this._key(row), { ...empty, ...row });
    } else this._rows.set(this._key(row), row);
  }

  /** @param {Row} row */
  _key(row) {
    const names = this.schema.filter((field) => field.flags?.includes("pk")).map((field) => field.name);
    return JSON.stringify((names.length ? names : ["_seq"]).map((name) => String(row[name])));
  }

  /** @param {any} wire @returns {Row} */
  _row(wire) {
    if (this.client.options.raw) return wire;
    const types = new Map(this.schema.map((field) => [field.name, field.data_type]));
    return Object.fromEntries(
      Object.entries(wire).map(([name, value]) => [name, native(value, name === "_seq" ? "BigInt" : types.get(name))]),
    );
  }

  _changed() {
    if (this.ready && this.options.onRows) this.options.onRows(this.rows, this);
  }

  _wake() {
    for (const resolve of this._waiting.splice(0)) resolve();
  }

  /** @param {KalamDbError} error */
  _end(error) {
    this.error = error;
    this.closed = true;
    this.client._socket.forget(this);
    this._wake();
    this.options.onError?.(error, this);
  }
}

/** The one socket of a client: opened for the first subscription, opened again when it is lost. */
class Socket {
  /** @param {Client} client */
  constructor(client) {
    this.client = client;
    /** @type {Map<string, Subscription>} */
    this.subscriptions = new Map();
    /** @type {WebSocket | null} */
    this.socket = null;
    this.online = false;
    this.paused = false;
    this.attempts = 0;
    /** @type {any} */
    this.timer = null;
    /** @type {any} */
    this.pinging = null;
    /** Frames are read one after another, also when some must be unpacked. @type {Promise<void>} */
    this.reading = Promise.resolve();
  }

  /** @param {Subscription} subscription */
  add(subscription) {
    this.subscriptions.set(subscription.id, subscription);
    if (this.online) this.send(subscription._message());
    else this.open();
  }

  /** @param {Subscription} subscription */
  remove(subscription) {
    if (this.forget(subscription)) this.send({ type: "unsubscribe", subscription_id: subscription.id });
  }

  /** @param {Subscription} subscription @returns {boolean} Whether it was known. */
  forget(subscription) {
    return this.subscriptions.delete(subscription.id);
  }

  /** @param {object} message */
  send(message) {
    if (this.online) this.socket?.send(JSON.stringify(message));
  }

  open() {
    if (this.socket || this.paused || !this.subscriptions.size) return;
    clearTimeout(this.timer);
    this.state("connecting");
    const Kind = this.client.options.WebSocket ?? globalThis.WebSocket;
    const socket = new Kind(this.client.url.replace(/^http/, "ws") + "/v1/ws");
    socket.binaryType = "arraybuffer";
    this.socket = socket;
    socket.onopen = () => this.authenticate();
    socket.onmessage = (event) => {
      const read = () => (socket === this.socket ? this.read(event.data) : undefined);
      this.reading = this.reading.then(read).catch((error) => this.failed(error));
    };
    socket.onclose = () => socket === this.socket && this.lost();
  }

  authenticate() {
    const compression = typeof DecompressionStream === "undefined" ? "none" : "gzip";
    const protocol = { serialization: "json", compression };
    this.socket?.send(JSON.stringify({ type: "authenticate", method: "jwt", token: this.client.token ?? "", protocol }));
  }

  /** A new token for the open socket. */
  renew() {
    if (this.online) this.authenticate();
  }

  /** @param {string | ArrayBuffer} data */
  async read(data) {
    const message = JSON.parse(typeof data === "string" ? data : await unpacked(data));
    if (message.type === "auth_success") {
      const first = !this.online;
      this.online = true;
      this.attempts = 0;
      if (first) {
        this.pinging = setInterval(() => this.send({ type: "ping" }), PING_MS);
        for (const subscription of this.subscriptions.values()) this.send(subscription._message());
        this.state("online");
      }
    } else if (message.type === "auth_error") await this.refused(message.message);
    else if (message.type === "error" && message.code === "AUTH_REQUIRED") {
      await this.refused(message.message);
      this.lost();
    } else if (message.type === "error" && this.mayRepeat(message)) this.lost();
    else this.subscriptions.get(message.subscription_id)?._receive(message);
  }

  /** Whether it is to be asked again on another socket: the server has no room now, or has not missed the former
   * socket yet. @param {any} message */
  mayRepeat(message) {
    const subscription = this.subscriptions.get(message.subscription_id);
    if (!subscription) return false;
    return message.code === "RATE_LIMIT_EXCEEDED" || (message.code === "SUBSCRIPTION_LIMIT_EXCEEDED" && subscription.schema.length > 0);
  }

  /** @param {string} message */
  async refused(message) {
    try {
      if (/expired/i.test(message)) return await this.client.refresh();
    } catch {
      // The refusal itself is what the caller must know.
    }
    const error = new KalamDbError("INVALID_CREDENTIALS", message, 401);
    for (const subscription of [...this.subscriptions.values()]) subscription._end(error);
  }

  /** @param {unknown} error */
  failed(error) {
    console.error("kalamdb: a frame could not be read or a callback failed", error);
  }

  lost() {
    this.drop();
    if (this.paused || !this.subscriptions.size) return this.state("offline");
    const base = Math.min((this.client.options.reconnectMs ?? 100) * 2 ** this.attempts++, RECONNECT_MAX_MS);
    this.timer = setTimeout(() => this.open(), base * (0.75 + Math.random() / 2));
    this.state("connecting");
  }

  drop() {
    clearInterval(this.pinging);
    clearTimeout(this.timer);
    const socket = this.socket;
    this.socket = null;
    this.online = false;
    this.reading = Promise.resolve();
    if (socket && socket.readyState <= 1) socket.close();
  }

  pause() {
    this.paused = true;
    this.drop();
    this.state("offline");
  }

  resume() {
    this.paused = false;
    this.open();
  }

  close() {
    for (const subscription of [...this.subscriptions.values()]) {
      this.forget(subscription);
      subscription.close();
    }
    this.drop();
    this.state("offline");
  }

  /** @param {"offline" | "connecting" | "online"} state */
  state(state) {
    this.client.options.onState?.(state);
  }
}

/** @param {string} text @returns {any} */
function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

/** @param {any} error @param {number} status */
function sqlError(error, status) {
  return new KalamDbError(error.code ?? "UNKNOWN", error.message ?? "the server refused the request", status, error.details);
}

/** @param {ArrayBuffer} data @returns {Promise<string>} */
async function unpacked(data) {
  const stream = new Blob([data]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

/** @param {Param} value A parameter as the wire takes it. */
function wireParam(value) {
  if (typeof value === "bigint") return value.toString();
  if (value instanceof Date) return value.toISOString().replace("Z", "");
  return value;
}

/**
 * A value of the wire as JavaScript has it: BIGINT as number where that is exact, else bigint;
 * TIMESTAMP, DATETIME and DATE as Date (whole milliseconds); BYTES as Uint8Array; JSON parsed; the rest as it is
 * (DECIMAL and UUID are text, TIME is a number of microseconds).
 * @param {any} value @param {any} type
 * @returns {any}
 */
export function native(value, type) {
  if (value === null || value === undefined) return null;
  switch (type) {
    case "BigInt": {
      const exact = BigInt(value);
      const number = Number(exact);
      return Number.isSafeInteger(number) ? number : exact;
    }
    case "Timestamp":
    case "DateTime":
      return new Date(Math.floor(Number(value) / 1000));
    case "Date":
      return new Date(Number(value) * 86_400_000);
    case "Bytes":
      return Uint8Array.from(value);
    case "Json":
      return typeof value === "string" ? (parsed(value) ?? value) : value;
    default:
      return value;
  }
}
