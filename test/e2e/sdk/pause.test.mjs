// Pause and resume: what ran goes on, what was written is there, and the API tells which is which.
import { InvalidArgumentError, Sandbox, SandboxNotFoundError } from 'e2b'
import assert from 'node:assert/strict'
import { test } from 'node:test'
import { all, call, eventually, port, sandboxTest, unique } from './support.mjs'

sandboxTest('what runs and what was written goes on after a pause', async (s) => {
  await s.files.write('counter.py', `
import time
n, log = 0, open('log', 'a', buffering=1)
while True:
    n += 1
    log.write(f'{n}\\n')
    time.sleep(0.05)`)
  const counter = await s.commands.run('exec python3 counter.py', { background: true })
  await s.commands.run('head -c 20000000 /dev/urandom > blob; sha256sum blob > sum; export SHELL_ONLY=1')
  await eventually(async () => (await s.files.read('log')).split('\n').length > 3, 'the counter')
  const boot = (await s.commands.run('cat /proc/sys/kernel/random/boot_id')).stdout
  const before = Number((await s.commands.run('tail -1 log')).stdout)

  assert.equal(await s.pause(), true)
  assert.equal((await s.getInfo()).state, 'paused')
  const again = await Sandbox.connect(s.sandboxId)
  assert.equal(again.sandboxId, s.sandboxId)
  assert.equal((await again.getInfo()).state, 'running')
  assert.equal((await again.commands.run('cat /proc/sys/kernel/random/boot_id')).stdout, boot)

  const numbers = () => again.files.read('log').then((t) => t.trim().split('\n').map(Number))
  await eventually(async () => (await numbers()).at(-1) > before + 2, 'the counter to go on')
  const log = await numbers()
  assert.deepEqual(log, log.map((_, i) => i + 1), 'the counter went on where it was')
  assert.match((await again.commands.run('sha256sum -c sum')).stdout, /OK/)

  const list = await again.commands.list()
  assert.ok(list.some((p) => p.pid === counter.pid), JSON.stringify(list))
  const joined = await again.commands.connect(counter.pid)
  assert.equal(await joined.kill(), true)
  await assert.rejects(joined.wait())
})

sandboxTest('output of a command can be followed again after a pause', async (s) => {
  const cat = await s.commands.run('cat', { background: true, stdin: true })
  await s.commands.sendStdin(cat.pid, 'before\n')
  await eventually(() => cat.stdout === 'before\n', 'the echo')
  await s.pause()
  await s.connect()
  const joined = await s.commands.connect(cat.pid)
  await s.commands.sendStdin(cat.pid, 'after\n')
  await eventually(() => joined.stdout.includes('after'), 'the echo after the pause')
  await s.commands.closeStdin(cat.pid)
  assert.equal((await joined.wait()).exitCode, 0)
})

sandboxTest('listening sockets answer after a pause, open connections end', async (s) => {
  await s.commands.run('mkdir www && echo served > www/index.html')
  await s.commands.run('exec python3 -m http.server 8000 -d www', { background: true })
  await eventually(async () => (await port(s, 8000)).status === 200, 'the server')
  await s.files.write('hold.py', `
import socket, time
l = socket.create_server(('0.0.0.0', 8001)); c, _ = l.accept(); c.recv(100)
c.sendall(b'HTTP/1.1 200 OK\\r\\nContent-Length: 1000\\r\\n\\r\\nhalf'); time.sleep(600)`)
  await s.commands.run('exec python3 hold.py', { background: true })
  const held = await eventually(async () => { const r = await port(s, 8001); return r.status === 200 && r }, 'half an answer')
  const rest = held.text().then(() => 'whole', () => 'cut')
  await s.pause()
  assert.equal(await rest, 'cut')
  await s.connect()
  assert.equal(await (await port(s, 8000, '/index.html')).text(), 'served\n')
})

sandboxTest('a paused sandbox is not running, and says so', async (s) => {
  await s.pause()
  assert.equal(await s.isRunning(), false)
  await assert.rejects(s.commands.run('true'))
  assert.equal(await s.pause(), false)
  assert.equal(await s.betaPause(), false)
  assert.equal((await call(`/sandboxes/${s.sandboxId}/pause`, { method: 'POST', body: '{}' })).status, 409)
})

sandboxTest('connect resumes with 201 and finds with 200, in both generations', async (s) => {
  for (const [path, body] of [['/v2/sandboxes', '{"timeout":60}'], ['/sandboxes', '{"timeout":60}']]) {
    await s.pause()
    const connect = () => call(`${path}/${s.sandboxId}/connect`, { method: 'POST', body })
    const resumed = await connect()
    assert.equal(resumed.status, 201)
    const told = await resumed.json()
    assert.equal(told.sandboxID, s.sandboxId)
    assert.ok(told.envdVersion && told.templateID && told.envdAccessToken, JSON.stringify(told))
    assert.equal((await connect()).status, 200)
    assert.equal((await s.commands.run('echo awake')).stdout, 'awake\n')
  }
})

sandboxTest('resuming sets a new end, and keeps what was asked for at the creation', async (s) => {
  await s.pause()
  await Sandbox.connect(s.sandboxId, { timeoutMs: 600_000 })
  const info = await s.getInfo()
  const left = info.endAt - Date.now()
  assert.ok(left > 500_000 && left < 610_000, `${left} ms left`)
  assert.deepEqual(info.metadata, { purpose: 'pause' })
  assert.equal((await s.commands.run('echo $KEPT')).stdout, 'yes\n')
  const time = Number((await s.commands.run('date +%s')).stdout)
  assert.ok(Math.abs(time - Date.now() / 1000) < 5, `the clock says ${time}`)
}, { metadata: { purpose: 'pause' }, envs: { KEPT: 'yes' } })

sandboxTest('without its memory a sandbox keeps its files and starts anew', async (s) => {
  await s.files.write('kept.txt', 'kept')
  const sleep = await s.commands.run('sleep 600', { background: true })
  assert.equal(await s.pause({ keepMemory: false }), true)
  const again = await Sandbox.connect(s.sandboxId)
  assert.equal(await again.files.read('kept.txt'), 'kept')
  assert.ok(!(await again.commands.list()).some((p) => p.pid === sleep.pid && p.cmd === 'sleep'))
  assert.equal((await again.commands.run('pgrep -x sleep || echo none')).stdout, 'none\n')
  assert.equal((await again.commands.run('echo $KEPT')).stdout, 'yes\n')
}, { envs: { KEPT: 'yes' } })

sandboxTest('connect with reboot is refused where memory was kept, and fine where it was not', async (s) => {
  const reboot = () => call(`/v2/sandboxes/${s.sandboxId}/connect`, { method: 'POST', body: '{"timeout":60,"memory":false}' })
  await s.files.write('kept.txt', 'kept')
  assert.equal((await reboot()).status, 200, 'one that runs')
  await s.pause()
  const refused = await reboot()
  assert.equal(refused.status, 501, await refused.text())
  await s.connect()
  await s.pause({ keepMemory: false })
  assert.equal((await reboot()).status, 201)
  assert.equal(await s.files.read('kept.txt'), 'kept')
})

test('paused sandboxes are listed by state, and can be killed', async () => {
  const tag = unique('paused')
  const made = await Promise.all([0, 1, 2].map(() => Sandbox.create({ timeoutMs: 120_000, metadata: { tag } })))
  try {
    await Promise.all([made[0].pause(), made[1].pause()])
    const ids = async (state) => (await all(Sandbox.list({ query: { metadata: { tag }, state }, limit: 1 }))).map((x) => x.sandboxId).sort()
    const names = (...some) => some.map((s) => s.sandboxId).sort()
    assert.deepEqual(await ids(['paused']), names(made[0], made[1]))
    assert.deepEqual(await ids(['running']), names(made[2]))
    assert.deepEqual(await ids(undefined), names(...made))
    assert.deepEqual(await ids(['running', 'paused']), names(...made))
    assert.equal(await Sandbox.kill(made[0].sandboxId), true)
    assert.equal(await Sandbox.kill(made[0].sandboxId), false)
    assert.deepEqual(await ids(['paused']), names(made[1]))
    await assert.rejects(Sandbox.connect(made[0].sandboxId), SandboxNotFoundError)
  } finally {
    await Promise.all(made.map((s) => Sandbox.kill(s.sandboxId)))
  }
})

test('what does not exist is neither paused nor resumed', async () => {
  await assert.rejects(Sandbox.pause('inothere000000000000'), SandboxNotFoundError)
  await assert.rejects(Sandbox.connect('inothere000000000000'), SandboxNotFoundError)
})

test('a timeout pauses where that was asked for', async () => {
  const s = await Sandbox.create({ timeoutMs: 3_000, lifecycle: { onTimeout: 'pause' } })
  try {
    assert.deepEqual((await s.getInfo()).lifecycle, { onTimeout: 'pause', autoResume: false })
    await s.files.write('kept.txt', 'kept')
    await eventually(async () => (await s.getInfo()).state === 'paused', 'the pause')
    const again = await Sandbox.connect(s.sandboxId, { timeoutMs: 60_000 })
    assert.equal(await again.files.read('kept.txt'), 'kept')
    await again.setTimeout(1_000)
    await eventually(async () => (await s.getInfo()).state === 'paused', 'the second pause')
  } finally {
    await Sandbox.kill(s.sandboxId)
  }
})

test('a timeout pauses without memory where that was asked for', async () => {
  const s = await Sandbox.create({ timeoutMs: 3_000, lifecycle: { onTimeout: { action: 'pause', keepMemory: false } } })
  try {
    await s.files.write('kept.txt', 'kept')
    await s.commands.run('sleep 600', { background: true })
    await eventually(async () => (await s.getInfo()).state === 'paused', 'the pause')
    const again = await Sandbox.connect(s.sandboxId, { timeoutMs: 60_000 })
    assert.equal(await again.files.read('kept.txt'), 'kept')
    assert.equal((await again.commands.run('pgrep -x sleep || echo none')).stdout, 'none\n')
  } finally {
    await Sandbox.kill(s.sandboxId)
  }
})

test('what cannot be together is refused before anything is asked', async () => {
  await assert.rejects(Sandbox.create({ lifecycle: { onTimeout: 'kill', autoResume: true } }), InvalidArgumentError)
  await assert.rejects(Sandbox.create({ lifecycle: { onTimeout: { action: 'pause', keepMemory: false }, autoResume: true } }), InvalidArgumentError)
})

test('many pause and resume at once', async () => {
  const made = await Promise.all(Array.from({ length: 6 }, () => Sandbox.create({ timeoutMs: 120_000 })))
  try {
    await Promise.all(made.map((s, i) => s.files.write('own', `${i}`)))
    for (let round = 0; round < 2; round++) {
      assert.deepEqual(await Promise.all(made.map((s) => s.pause())), made.map(() => true))
      await Promise.all(made.map((s) => s.connect()))
      assert.deepEqual(await Promise.all(made.map((s) => s.files.read('own'))), made.map((_, i) => `${i}`))
    }
  } finally {
    await Promise.all(made.map((s) => Sandbox.kill(s.sandboxId)))
  }
})
