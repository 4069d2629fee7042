// An extension of ours: a timeout that counts from the last use of a sandbox.
import { Sandbox } from 'e2b'
import assert from 'node:assert/strict'
import { test } from 'node:test'
import { call, eventually } from './support.mjs'

/** Creates a sandbox that is paused after so many seconds without use. */
async function idle(timeout) {
  const body = { templateID: 'base', timeout, autoPause: true, autoResume: { enabled: true }, idleTimeout: true, secure: true }
  const answer = await call('/sandboxes', { method: 'POST', body: JSON.stringify(body) })
  assert.equal(answer.status, 201)
  return (await answer.json()).sandboxID
}

/** What the API says of it: looking is no use of it. */
async function info(id) {
  return (await call(`/sandboxes/${id}`)).json()
}

test('use keeps a sandbox awake, and without it it is paused', async () => {
  const id = await idle(3)
  try {
    const s = await Sandbox.connect(id, { timeoutMs: 3000 })
    const begun = Date.now()
    await s.commands.run('sleep 8') // a stream that is open, on which nothing passes
    assert.equal((await info(id)).state, 'running')
    assert.ok(new Date((await info(id)).endAt).getTime() - begun > 9000, 'its end has moved')
    await eventually(async () => (await info(id)).state === 'paused', 'the pause')
    const after = Date.now() - begun - 8000
    assert.ok(after > 2800 && after < 9000, `paused ${after} ms after its last use`)
    assert.equal((await info(id)).reason, 'idle for 3s')
    assert.equal((await s.commands.run('echo back')).stdout, 'back\n')
  } finally {
    await Sandbox.kill(id)
  }
})

test('what its processes compute keeps it awake', async () => {
  const id = await idle(3)
  try {
    const s = await Sandbox.connect(id, { timeoutMs: 3000 })
    const busy = await s.commands.run('timeout 20 sh -c "while :; do :; done"', { background: true, timeoutMs: 0 })
    await busy.disconnect()
    const begun = Date.now()
    await eventually(async () => (await info(id)).state === 'paused', 'the pause', 60_000)
    const after = Date.now() - begun
    assert.ok(after > 19_000, `paused after ${after} ms, while it computed for 20 s`)
  } finally {
    await Sandbox.kill(id)
  }
})
