import { Sandbox, SandboxNotFoundError, NotFoundError, AuthenticationError } from 'e2b'
import assert from 'node:assert/strict'
import { test } from 'node:test'
import { call, eventually, sandboxTest } from './support.mjs'

sandboxTest('create gives a running sandbox with its settings', async (s) => {
  assert.match(s.sandboxId, /^[a-z0-9]+$/)
  assert.equal(await s.isRunning(), true)
  const info = await s.getInfo()
  assert.equal(info.sandboxId, s.sandboxId)
  assert.equal(info.state, 'running')
  assert.deepEqual(info.metadata, { purpose: 'test' })
  assert.equal(info.cpuCount, 2)
  assert.equal(info.memoryMB, 512)
  assert.ok(info.endAt > info.startedAt)
  const env = await s.commands.run('echo "$GREETING $E2B_SANDBOX_ID"')
  assert.equal(env.stdout, `hello ${s.sandboxId}\n`)
}, { metadata: { purpose: 'test' }, envs: { GREETING: 'hello' } })

sandboxTest('connect finds a running sandbox and only extends its time', async (s) => {
  const before = (await s.getInfo()).endAt
  const other = await Sandbox.connect(s.sandboxId, { timeoutMs: 1_000 })
  assert.equal((await other.commands.run('echo again')).stdout, 'again\n')
  assert.ok((await s.getInfo()).endAt >= before)
  await Sandbox.connect(s.sandboxId, { timeoutMs: 600_000 })
  assert.ok((await s.getInfo()).endAt > before)
})

sandboxTest('set timeout moves the end both ways', async (s) => {
  await s.setTimeout(600_000)
  const long = (await s.getInfo()).endAt
  await s.setTimeout(30_000)
  const short = (await s.getInfo()).endAt
  assert.ok(short < long)
})

test('a timeout ends the sandbox', async () => {
  const s = await Sandbox.create({ timeoutMs: 2_000 })
  await eventually(async () => !(await s.isRunning()), 'the sandbox to end')
  await eventually(() => Sandbox.getInfo(s.sandboxId).then(() => false, (e) => e instanceof NotFoundError), 'the API to know')
})

test('kill ends a sandbox once', async () => {
  const s = await Sandbox.create()
  assert.equal(await s.kill(), true)
  assert.equal(await Sandbox.kill(s.sandboxId), false)
  assert.equal(await s.isRunning(), false)
  await assert.rejects(s.commands.run('true'))
})

test('what does not exist is said so', async () => {
  await assert.rejects(Sandbox.connect('idoesnotexist0000000'), SandboxNotFoundError)
  await assert.rejects(Sandbox.getInfo('idoesnotexist0000000'), NotFoundError)
  assert.equal(await Sandbox.kill('idoesnotexist0000000'), false)
  await assert.rejects(Sandbox.create('no-such-template'), /template/i)
})

test('a wrong key is refused', async () => {
  await assert.rejects(Sandbox.create({ apiKey: 'e2b_' + '0'.repeat(40) }), AuthenticationError)
})

test('bad input gets 400 with what was wrong', async () => {
  for (const [path, body, text] of [
    ['/v2/sandboxes', '{"templateID":', /JSON/i],
    ['/v2/sandboxes', '{"templateID":"base","timeout":-5}', /-5/],
    ['/sandboxes', '{"templateID":"base","metadata":{"a":1}}', /metadata/],
    ['/v2/sandboxes', '{"templateID":"BAD NAME!"}', /BAD NAME!/],
  ]) {
    const r = await call(path, { method: 'POST', body })
    const answer = await r.json()
    assert.equal(r.status, 400, `${body}: ${JSON.stringify(answer)}`)
    assert.equal(answer.code, 400)
    assert.match(answer.message, text)
  }
  assert.equal((await call('/sandboxes/UPPER!')).status >= 400, true)
})

test('list pages, filters by metadata and by state', async () => {
  const tag = `t${Date.now()}`
  const made = []
  try {
    for (let i = 0; i < 3; i++) {
      made.push(await Sandbox.create({ timeoutMs: 120_000, metadata: { tag, 'odd key': `a=${i}&b` } }))
    }
    const seen = []
    const pages = Sandbox.list({ query: { metadata: { tag } }, limit: 2 })
    while (pages.hasNext) seen.push(...(await pages.nextItems()))
    assert.deepEqual(seen.map((x) => x.sandboxId), made.map((x) => x.sandboxId).reverse())

    const one = await Sandbox.list({ query: { metadata: { tag, 'odd key': 'a=1&b' }, state: ['running'] } }).nextItems()
    assert.deepEqual(one.map((x) => x.sandboxId), [made[1].sandboxId])
    const none = await Sandbox.list({ query: { metadata: { tag }, state: ['paused'] } }).nextItems()
    assert.deepEqual(none, [])
  } finally {
    await Promise.all(made.map((s) => s.kill()))
  }
})

sandboxTest('metrics tell the size and use of the machine', async (s) => {
  await s.commands.run('head -c 50000000 /dev/zero > blob')
  const m = await eventually(async () => (await s.getMetrics()).at(-1), 'metrics')
  assert.equal(m.cpuCount, 2)
  assert.equal(m.memTotal, 512 * 1024 * 1024)
  assert.ok(m.memUsed > 0 && m.memUsed <= m.memTotal)
  assert.ok(m.diskTotal > 1e9)
  assert.ok(m.diskUsed > 0)
})

sandboxTest('logs tell what ran', async (s) => {
  await s.commands.run('echo logged')
  const r = await call(`/sandboxes/${s.sandboxId}/logs`)
  assert.equal(r.status, 200)
  const { logs } = await r.json()
  assert.ok(logs.length > 0)
  const line = JSON.parse(logs[0].line)
  assert.ok(line.level && line.logger !== undefined)
})

sandboxTest('refreshes extend the time', async (s) => {
  const r = await call(`/sandboxes/${s.sandboxId}/refreshes`, { method: 'POST', body: '{"duration":600}' })
  assert.equal(r.status, 204)
  assert.ok((await s.getInfo()).endAt - Date.now() > 500_000)
})

test('many at once all succeed', async () => {
  const all = await Promise.all(Array.from({ length: 12 }, () => Sandbox.create({ timeoutMs: 120_000 })))
  try {
    const out = await Promise.all(all.map((s, i) => s.commands.run(`echo ${i}`)))
    assert.deepEqual(out.map((r) => r.stdout), all.map((_, i) => `${i}\n`))
    assert.equal(new Set(all.map((s) => s.sandboxId)).size, all.length)
  } finally {
    await Promise.all(all.map((s) => s.kill()))
  }
})

test('base is listed and found by its alias', async () => {
  const list = await (await call('/templates')).json()
  const base = list.find((t) => t.aliases.includes('base'))
  assert.ok(base, JSON.stringify(list))
  assert.ok(Array.isArray(base.names))
  assert.equal((await call('/templates/aliases/base')).status, 200)
  assert.equal((await call('/templates/aliases/nothere')).status, 404)
})
