// Auto-resume: the first request to a paused sandbox makes it run again, and is answered by it.
import { Sandbox } from 'e2b'
import assert from 'node:assert/strict'
import { eventually, port, sandboxTest } from './support.mjs'

const resumable = { lifecycle: { onTimeout: 'pause', autoResume: true } }

/** Has something answer on a port of the sandbox, however many connect at once. */
async function serve(s, number) {
  await s.files.write('www/index.html', 'served\n')
  await s.files.write('serve.py', `
from http.server import ThreadingHTTPServer, SimpleHTTPRequestHandler
class Server(ThreadingHTTPServer): request_queue_size = 1024
Server(('', ${number}), SimpleHTTPRequestHandler).serve_forever()`)
  await s.commands.run('cd www && exec python3 ../serve.py', { background: true, timeoutMs: 0 })
  await eventually(async () => (await port(s, number)).status === 200, 'the server')
}

sandboxTest('the first request resumes a paused sandbox', async (s) => {
  assert.deepEqual((await s.getInfo()).lifecycle, { onTimeout: 'pause', autoResume: true })
  await serve(s, 8000)
  await s.pause()
  assert.equal((await s.getInfo()).state, 'paused')
  const answer = await port(s, 8000)
  assert.equal(answer.status, 200)
  assert.equal(await answer.text(), 'served\n')
  const info = await s.getInfo()
  assert.equal(info.state, 'running')
  const left = info.endAt.getTime() - Date.now()
  assert.ok(left > 60_000 && left < 121_000, `it lives for its last timeout, not ${left} ms`)
}, resumable)

sandboxTest('so does the first command', async (s) => {
  await s.files.write('kept', 'yes')
  await s.pause()
  assert.equal((await s.commands.run('cat kept')).stdout, 'yes')
}, resumable)

sandboxTest('many requests at once resume it once, and all are answered', async (s) => {
  await serve(s, 8000)
  for (let round = 0; round < 3; round++) {
    await s.pause()
    const answers = await Promise.all(Array.from({ length: 100 }, () => port(s, 8000).then((r) => r.text())))
    assert.deepEqual(new Set(answers), new Set(['served\n']))
  }
}, resumable)

sandboxTest('a timeout pauses it, and a request brings it back', async (s) => {
  await s.setTimeout(1000)
  await eventually(async () => (await s.getInfo()).state === 'paused', 'the pause')
  assert.equal((await s.commands.run('echo back')).stdout, 'back\n')
}, resumable)

sandboxTest('a request that comes during a pause waits for it', async (s) => {
  await serve(s, 8000)
  const paused = s.pause()
  const answers = await Promise.all(Array.from({ length: 20 }, (_, i) =>
    new Promise((r) => setTimeout(r, i * 5)).then(() => port(s, 8000)).then((r) => r.text())))
  await paused
  assert.deepEqual(new Set(answers), new Set(['served\n']))
}, resumable)

sandboxTest('without auto-resume a paused sandbox stays paused', async (s) => {
  await s.pause()
  assert.equal((await port(s, 8000)).status, 502)
  assert.equal((await s.getInfo()).state, 'paused')
}, { lifecycle: { onTimeout: 'pause' } })

sandboxTest('killing a paused sandbox does not resume it', async (s) => {
  await s.pause()
  assert.equal(await Sandbox.kill(s.sandboxId), true)
  assert.equal((await port(s, 8000)).status, 502)
}, resumable)
