// What the end-to-end tests share: one sandbox per test, ended whatever happens.
import { Sandbox } from 'e2b'
import { test } from 'node:test'

/** Runs fn with a fresh sandbox that is killed afterwards. */
export function sandboxTest(name, fn, opts = {}) {
  test(name, async (t) => {
    const sandbox = await Sandbox.create({ timeoutMs: 120_000, ...opts })
    try {
      await fn(sandbox, t)
    } finally {
      await sandbox.kill().catch(() => {})
    }
  })
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
