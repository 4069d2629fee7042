// What the end-to-end tests share: one sandbox per test, ended whatever happens.
import { Sandbox } from 'e2b'
import { execFile } from 'node:child_process'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'node:test'

/** Runs fn with a fresh sandbox that is killed afterwards. */
export function sandboxTest(name, fn, opts = {}) {
  test(name, async (t) => {
    const { template, ...rest } = opts
    const settings = { timeoutMs: 120_000, ...rest }
    const sandbox = await (template ? Sandbox.create(await template(), settings) : Sandbox.create(settings))
    try {
      await fn(sandbox, t)
    } finally {
      await Sandbox.kill(sandbox.sandboxId).catch(() => {})
    }
  })
}

/** Runs fn with a sandbox, which is killed afterwards; returns what fn does. */
export async function using(sandbox, fn) {
  const s = await sandbox
  try {
    return await fn(s)
  } finally {
    await Sandbox.kill(s.sandboxId).catch(() => {})
  }
}

/** Waits until check() answers something truthy, and returns it. */
export async function eventually(check, what, ms = 15_000) {
  const end = Date.now() + ms
  for (;;) {
    const got = await check()
    if (got) return got
    if (Date.now() > end) throw new Error(`timed out waiting for ${what}`)
    await new Promise((r) => setTimeout(r, 50))
  }
}

export const api = process.env.E2B_API_URL
export const proxy = process.env.E2B_SANDBOX_URL
export const key = process.env.E2B_API_KEY

/** A plain request to the control API. */
export function call(path, init = {}) {
  return fetch(api + path, { ...init, headers: { 'X-API-KEY': key, 'Content-Type': 'application/json', ...init.headers } })
}

/** A request to a port of a sandbox. */
export function port(sandbox, number, path = '/') {
  return fetch(proxy + path, { headers: { 'E2b-Sandbox-Id': sandbox.sandboxId, 'E2b-Sandbox-Port': String(number) } })
}

/** A name that no other test has. */
export function unique(what) {
  return `${what}-${Date.now().toString(36)}${Math.random().toString(36).slice(2, 8)}`
}

/** Removes templates and snapshots by id or name; what is not there is fine. */
export async function removeTemplates(...ids) {
  for (const id of ids) await call(`/templates/${encodeURIComponent(id)}`, { method: 'DELETE' })
}

/** Runs fn with a temporary directory. */
export async function inDirectory(fn) {
  const dir = await mkdtemp(join(tmpdir(), 'cloister-e2e-'))
  try {
    return await fn(dir)
  } finally {
    await rm(dir, { recursive: true, force: true })
  }
}

/** All items of a paginator. */
export async function all(pages) {
  const items = []
  while (pages.hasNext) items.push(...(await pages.nextItems()))
  return items
}

/** Runs a program with an empty standard input, which some commands read to its end. */
export function run(file, args, opts) {
  return new Promise((resolve, reject) => {
    const child = execFile(file, args, { timeout: 120_000, ...opts }, (error, stdout, stderr) => (error ? reject(Object.assign(error, { stdout, stderr })) : resolve({ stdout, stderr })))
    child.stdin.end()
  })
}

/** Runs the official command line. */
export const e2b = (...args) => run(join(import.meta.dirname, '../node_modules/.bin/e2b'), args)

/** Runs ours. */
export const cloister = (...args) => run(process.env.CLOISTER_BINARY, ['--data-dir', process.env.CLOISTER_DATA_DIR, ...args])
