// Snapshots and forks.
import { Sandbox, SandboxNotFoundError } from 'e2b'
import assert from 'node:assert/strict'
import { test } from 'node:test'
import { all, call, eventually, port, proxy, removeTemplates, sandboxTest, unique, using } from './support.mjs'

const counter = `
import time
n = 0
while True:
    n += 1
    open('count', 'w').write(f'{n}\\n')
    time.sleep(0.05)`

sandboxTest('a snapshot starts sandboxes as its source was, and the source goes on', async (s) => {
  await s.files.write('counter.py', counter)
  await s.commands.run('exec python3 counter.py', { background: true })
  await s.files.write('state', 'before')
  await eventually(async () => Number(await s.files.read('count').catch(() => 0)) > 2, 'the counter')
  const snapshot = await s.createSnapshot()
  assert.match(snapshot.snapshotId, /./)
  assert.ok(Array.isArray(snapshot.names))
  try {
    await s.files.write('state', 'after')
    const at = Number(await s.files.read('count'))
    await eventually(async () => Number(await s.files.read('count')) > at, 'the source to go on')
    await using(Sandbox.create(snapshot.snapshotId, { timeoutMs: 120_000, metadata: { from: 'snapshot' } }), async (copy) => {
      assert.notEqual(copy.sandboxId, s.sandboxId)
      assert.equal(await copy.files.read('state'), 'before')
      const then = Number(await copy.files.read('count'))
      await eventually(async () => Number(await copy.files.read('count')) > then, 'the copy of the process to go on')
      await copy.files.write('state', 'the copy\'s')
      assert.equal(await s.files.read('state'), 'after')
      assert.deepEqual((await copy.getInfo()).metadata, { from: 'snapshot' })
      assert.equal((await copy.commands.run('echo $E2B_SANDBOX_ID')).stdout, `${copy.sandboxId}\n`)
    })
  } finally {
    await Sandbox.deleteSnapshot(snapshot.snapshotId)
  }
})

sandboxTest('a snapshot outlives its source', async (s) => {
  await s.files.write('state', 'kept')
  const { snapshotId } = await s.createSnapshot()
  await s.kill()
  await using(Sandbox.create(snapshotId), async (copy) => assert.equal(await copy.files.read('state'), 'kept'))
  assert.equal(await Sandbox.deleteSnapshot(snapshotId), true)
})

sandboxTest('each copy is a sandbox of its own', async (s) => {
  const { snapshotId } = await s.createSnapshot()
  const copies = await Promise.all([0, 1, 2].map(() => Sandbox.create(snapshotId, { timeoutMs: 120_000 })))
  try {
    await Promise.all(copies.map((c, i) => c.files.write('own', `${i}`)))
    assert.deepEqual(await Promise.all(copies.map((c) => c.files.read('own'))), ['0', '1', '2'])
    const random = await Promise.all(copies.map((c) => c.commands.run('head -c 16 /dev/urandom | sha256sum').then((r) => r.stdout)))
    assert.equal(new Set(random).size, 3, 'each has random numbers of its own')
    assert.equal(new Set(copies.map((c) => c.envdAccessToken)).size, 3, 'each has a token of its own')
    const stolen = await fetch(proxy + '/files?path=own', { headers: { 'E2b-Sandbox-Id': copies[0].sandboxId, 'E2b-Sandbox-Port': '49983', 'X-Access-Token': copies[1].envdAccessToken } })
    assert.equal(stolen.status, 401, 'a token opens one sandbox alone')
  } finally {
    await Promise.all(copies.map((c) => c.kill()))
    await Sandbox.deleteSnapshot(snapshotId)
  }
})

sandboxTest('a snapshot of a snapshot\'s sandbox, and pause of it', async (s) => {
  await s.files.write('trail', 'one\n')
  const first = await s.createSnapshot()
  let second
  try {
    await using(Sandbox.create(first.snapshotId, { timeoutMs: 120_000 }), async (child) => {
      await child.commands.run('echo two >> trail')
      await child.pause()
      await child.connect()
      second = await child.createSnapshot()
    })
    await using(Sandbox.create(second.snapshotId), async (grandchild) => assert.equal(await grandchild.files.read('trail'), 'one\ntwo\n'))
  } finally {
    await removeTemplates(first.snapshotId, ...(second ? [second.snapshotId] : []))
  }
})

sandboxTest('a named snapshot is found by its name, and a second one takes it over', async (s) => {
  const name = unique('snap')
  await s.files.write('version', '1')
  const first = await s.createSnapshot({ name })
  assert.ok(first.names.some((n) => n.includes(name)), JSON.stringify(first))
  try {
    await using(Sandbox.create(name), async (copy) => assert.equal(await copy.files.read('version'), '1'))
    await s.files.write('version', '2')
    await s.createSnapshot({ name })
    await using(Sandbox.create(name), async (copy) => assert.equal(await copy.files.read('version'), '2'))
    await s.files.write('version', '3')
    const tagged = await s.createSnapshot({ name: `${name}:third` })
    assert.ok(tagged.names.some((n) => n.endsWith(`${name}:third`)), JSON.stringify(tagged))
    await using(Sandbox.create(`${name}:third`), async (copy) => assert.equal(await copy.files.read('version'), '3'))
    await using(Sandbox.create(name), async (copy) => assert.equal(await copy.files.read('version'), '2'))
    const byName = await all(Sandbox.listSnapshots({ name }))
    assert.ok(byName.length >= 1 && byName.every((x) => x.names.some((n) => n.includes(name))), JSON.stringify(byName))
  } finally {
    await removeTemplates(name)
  }
})

sandboxTest('snapshots are listed, by page and by source', async (s) => {
  const made = []
  try {
    for (let i = 0; i < 3; i++) made.push((await s.createSnapshot()).snapshotId)
    const pages = Sandbox.listSnapshots({ sandboxId: s.sandboxId, limit: 2 })
    const first = await pages.nextItems()
    assert.equal(first.length, 2)
    assert.equal(pages.hasNext, true)
    const ids = [...first, ...(await all(pages))].map((x) => x.snapshotId)
    assert.deepEqual([...ids].sort(), [...made].sort())
    assert.deepEqual((await all(s.listSnapshots())).map((x) => x.snapshotId), ids)
    const every = (await all(Sandbox.listSnapshots())).map((x) => x.snapshotId)
    assert.ok(made.every((id) => every.includes(id)))
    assert.deepEqual(await all(Sandbox.listSnapshots({ sandboxId: 'inothere000000000000' })), [])
  } finally {
    await removeTemplates(...made)
  }
})

sandboxTest('a snapshot is deleted once', async (s) => {
  const { snapshotId } = await s.createSnapshot()
  const user = await Sandbox.create(snapshotId, { timeoutMs: 120_000 })
  try {
    assert.equal(await Sandbox.deleteSnapshot(snapshotId), true)
    assert.equal(await Sandbox.deleteSnapshot(snapshotId), false)
    await assert.rejects(Sandbox.create(snapshotId))
    assert.equal((await user.commands.run('echo still here')).stdout, 'still here\n')
    await user.pause()
    await user.connect()
    assert.equal((await user.commands.run('echo and again')).stdout, 'and again\n')
  } finally {
    await user.kill()
  }
  assert.equal(await Sandbox.deleteSnapshot('nosuchsnapshot00000:default'), false)
})

test('only what runs can be snapshotted', async () => {
  await assert.rejects(Sandbox.createSnapshot('inothere000000000000'), SandboxNotFoundError)
})

sandboxTest('forks go on from where their source is, each for itself', async (s) => {
  await s.files.write('counter.py', counter)
  await s.commands.run('exec python3 counter.py', { background: true })
  await s.files.write('shared', 'from the source')
  await eventually(async () => Number(await s.files.read('count').catch(() => 0)) > 2, 'the counter')
  const end = (await s.getInfo()).endAt
  const forks = await s.fork({ count: 3, timeoutMs: 120_000 })
  assert.equal(forks.length, 3)
  try {
    for (const f of forks) assert.ok(f instanceof Sandbox, String(f))
    assert.equal(new Set([s.sandboxId, ...forks.map((f) => f.sandboxId)]).size, 4)
    assert.equal(+(await s.getInfo()).endAt, +end, 'the source keeps its end')
    await Promise.all(forks.map(async (f, i) => {
      assert.equal(await f.files.read('shared'), 'from the source')
      await f.files.write('shared', `fork ${i}`)
      const then = Number(await f.files.read('count'))
      await eventually(async () => Number(await f.files.read('count')) > then, 'the process in the fork')
      const left = (await f.getInfo()).endAt - Date.now()
      assert.ok(left > 60_000 && left < 130_000, `${left} ms left`)
    }))
    assert.equal(await s.files.read('shared'), 'from the source')
    assert.deepEqual(await Promise.all(forks.map((f) => f.files.read('shared'))), ['fork 0', 'fork 1', 'fork 2'])
    await forks[0].kill()
    assert.equal(await forks[1].isRunning(), true)
    assert.equal(await s.isRunning(), true)
  } finally {
    await Promise.all(forks.map((f) => f.kill?.()))
  }
})

sandboxTest('a fork serves what its source served', async (s) => {
  await s.commands.run('mkdir www && echo served > www/index.html')
  await s.commands.run('exec python3 -m http.server 8000 -d www', { background: true })
  await eventually(async () => (await port(s, 8000)).status === 200, 'the server')
  const [f] = await s.fork()
  try {
    await f.commands.run('echo forked > www/index.html')
    assert.equal(await (await port(f, 8000, '/index.html')).text(), 'forked\n')
    assert.equal(await (await port(s, 8000, '/index.html')).text(), 'served\n')
  } finally {
    await f.kill()
  }
})

sandboxTest('wrong forks are refused', async (s) => {
  for (const body of ['{"count":0}', '{"count":-1}', '{"count":100000}']) {
    const r = await call(`/sandboxes/${s.sandboxId}/fork`, { method: 'POST', body })
    assert.equal(r.status, 400, `${body}: ${await r.text()}`)
  }
  assert.equal((await call('/sandboxes/inothere000000000000/fork', { method: 'POST', body: '{}' })).status, 404)
})
