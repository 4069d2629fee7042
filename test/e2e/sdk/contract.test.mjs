// What programs written for the hosted service rely on, and what is easily lost.
import { FileType, InvalidArgumentError, NotFoundError, Sandbox, Secret, TimeoutError, Volume } from 'e2b'
import assert from 'node:assert/strict'
import { call, eventually, proxy, sandboxTest } from './support.mjs'

const unexpired = { useSignatureExpiration: 60_000 }

sandboxTest('a server is reached whichever address of its machine it listens on', async (s) => {
  const to = (port) => fetch(proxy, { headers: { 'E2b-Sandbox-Id': s.sandboxId, 'E2b-Sandbox-Port': String(port) } })
  const addresses = ['0.0.0.0', '::', '127.0.0.1', 'localhost', '::1']
  await Promise.all(addresses.map(async (address, i) => {
    const port = 3400 + i
    await s.commands.run(`exec python3 -m http.server ${port} --bind ${address}`, { background: true })
    await eventually(async () => (await to(port)).status === 200, `an answer from ${address}`)
  }))
  assert.equal((await to(3500)).status, 502)
})

sandboxTest('what is sent through a loopback port arrives whole, both ways', async (s) => {
  await s.files.write('echo.py', `
import http.server
class H(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers['Content-Length']))
        self.send_response(200); self.send_header('Content-Length', str(len(body))); self.end_headers(); self.wfile.write(body)
http.server.HTTPServer(('127.0.0.1', 3410), H).serve_forever()`)
  await s.commands.run('exec python3 echo.py', { background: true })
  const body = 'loopback '.repeat(300_000)
  const sent = () => fetch(proxy, { method: 'POST', body, headers: { 'E2b-Sandbox-Id': s.sandboxId, 'E2b-Sandbox-Port': '3410' } })
  const answer = await eventually(async () => { const r = await sent(); return r.status === 200 && r.text() }, 'the echo')
  assert.equal(answer, body)
})

sandboxTest('the agent\'s way into the loopback is not open to clients', async (s) => {
  for (const path of ['/loopback?port=22', '//loopback?port=22', '/%6coopback?port=22']) {
    const headers = { 'E2b-Sandbox-Id': s.sandboxId, 'E2b-Sandbox-Port': '49983', 'X-Access-Token': s.envdAccessToken }
    assert.equal((await fetch(proxy + path, { headers })).status, 404, path)
  }
})

sandboxTest('a sandbox knows what it is', async (s) => {
  const r = await s.commands.run('echo $E2B_SANDBOX $E2B_SANDBOX_ID $FOO; for f in SANDBOX SANDBOX_ID; do echo $(cat /run/e2b/.E2B_$f); done')
  assert.equal(r.stdout, `true ${s.sandboxId} all\ntrue\n${s.sandboxId}\n`)
  assert.equal((await s.commands.run('echo $FOO', { envs: { FOO: 'one' } })).stdout, 'one\n')
}, { envs: { FOO: 'all' } })

sandboxTest('killing a command ends its stream, also when children keep the output open', async (s) => {
  const command = await s.commands.run('sleep 300 && echo done', { background: true })
  await s.commands.kill(command.pid)
  await assert.rejects(command.wait())
  assert.deepEqual(await s.commands.list(), [])
  await assert.rejects(s.commands.run(`kill -0 ${command.pid}`))
})

sandboxTest('a command that never stops talking still meets its timeout', async (s) => {
  await assert.rejects(s.commands.run('while :; do echo a; sleep 0.05; done', { timeoutMs: 700, onStdout: () => {} }), TimeoutError)
})

sandboxTest('characters are not torn apart in long output', async (s) => {
  const text = 'x'.repeat(65_535) + 'ご'.repeat(1000)
  assert.equal((await s.commands.run(`printf %s '${text}'`)).stdout, text)
})

sandboxTest('killing a sandbox tells its open commands why they end', async (s) => {
  const command = await s.commands.run('sleep 300', { background: true })
  await s.kill()
  await assert.rejects(command.wait(), /sandbox was killed or reached its end of life/)
})

sandboxTest('a terminal outlives its client, and can be joined again', async (s) => {
  const decoder = new TextDecoder()
  const seen = ['', '']
  const into = (i) => (d) => { seen[i] += decoder.decode(d) }
  const first = await s.pty.create({ cols: 80, rows: 24, onData: into(0), envs: { WORD: 'carried' } })
  const type = (text) => s.pty.sendInput(first.pid, new TextEncoder().encode(text))
  await type('echo $WORD\n')
  await eventually(() => seen[0].includes('carried'), 'the first echo')
  await first.disconnect()
  const second = await s.pty.connect(first.pid, { onData: into(1) })
  await type('echo $WORD\nexit\n')
  assert.equal((await second.wait()).exitCode, 0)
  assert.match(seen[1], /carried/)
  assert.equal(await s.pty.kill(999_999), false)
  await assert.rejects(s.pty.connect(999_999, { onData: () => {} }), NotFoundError)
})

sandboxTest('metadata of files', async (s) => {
  const metadata = { author: 'ada', purpose: 'upload' }
  for (const useOctetStream of [false, true]) {
    const path = `with-${useOctetStream}.txt`
    assert.deepEqual((await s.files.write(path, 'x', { metadata, useOctetStream })).metadata, metadata)
    assert.deepEqual((await s.files.getInfo(path)).metadata, metadata)
  }
  assert.deepEqual((await s.files.rename('with-true.txt', 'new/moved.txt')).metadata, metadata)
  assert.equal((await s.files.write('with-false.txt', 'again')).metadata, undefined)
  await s.commands.run(`python3 -c "import os; os.setxattr('with-false.txt', 'user.e2b.author', b'inside')"`)
  const listed = (await s.files.list('.')).find((e) => e.name === 'with-false.txt')
  assert.deepEqual(listed.metadata, { author: 'inside' })
})

sandboxTest('compressed files, empty files and every format', async (s) => {
  const content = 'compressed on the way '.repeat(1000)
  await s.files.write('z.txt', content, { gzip: true })
  assert.equal(await s.files.read('z.txt', { gzip: true }), content)
  assert.equal((await s.files.getInfo('z.txt')).size, content.length)
  for (const text of ['', 'short']) {
    await s.files.write('f.txt', text)
    assert.equal(await s.files.read('f.txt'), text)
    assert.equal(new TextDecoder().decode(await s.files.read('f.txt', { format: 'bytes' })), text)
    assert.equal(await (await s.files.read('f.txt', { format: 'blob' })).text(), text)
    let streamed = ''
    for await (const chunk of await s.files.read('f.txt', { format: 'stream' })) streamed += new TextDecoder().decode(chunk)
    assert.equal(streamed, text)
  }
})

sandboxTest('lists are in order, to the depth asked for', async (s) => {
  for (const path of ['t/b/y', 't/b/x', 't/a/z']) await s.files.makeDir(path)
  await s.files.write('t/c.txt', 'c')
  const names = async (depth) => (await s.files.list('t', { depth })).map((e) => e.path.replace('/home/user/t/', ''))
  assert.deepEqual(await names(1), ['a', 'b', 'c.txt'])
  assert.deepEqual(await names(2), ['a', 'a/z', 'b', 'b/x', 'b/y', 'c.txt'])
  assert.deepEqual(await names(9), await names(2))
  await assert.rejects(s.files.list('nowhere'), NotFoundError)
  await assert.rejects(s.files.list('t/c.txt'), InvalidArgumentError)
  await s.commands.run('ln -s c.txt t/link')
  const link = await s.files.getInfo('t/link')
  assert.equal(link.symlinkTarget, '/home/user/t/c.txt')
  assert.equal((await s.files.getInfo('t')).type, FileType.DIR)
})

sandboxTest('watching says what changed, and refuses what is no directory', async (s) => {
  await s.files.makeDir('w')
  const events = []
  const watch = await s.files.watchDir('w', (e) => { events.push(e) }, { includeEntry: true })
  await s.files.write('w/new.txt', 'abc')
  const entry = (await eventually(() => events.find((e) => e.entry?.name === 'new.txt'), 'an event with its entry')).entry
  assert.deepEqual([entry.path, entry.type], ['/home/user/w/new.txt', FileType.FILE])
  await watch.stop()
  await assert.rejects(s.files.watchDir('nowhere', () => {}), NotFoundError)
  await assert.rejects(s.files.watchDir('w/new.txt', () => {}))
})

sandboxTest('signatures: expired ones, forged ones, another user\'s files', async (s) => {
  await s.files.write('secret.txt', 'for root', { user: 'root' })
  const own = await fetch(await s.downloadUrl('secret.txt', { user: 'root', ...unexpired }))
  assert.deepEqual([own.status, await own.text()], [200, 'for root'])
  const late = await fetch(await s.downloadUrl('secret.txt', { useSignatureExpiration: -10_000 }))
  assert.deepEqual([late.status, await late.json()], [401, { code: 401, message: 'signature is already expired' }])
  const form = new FormData()
  form.append('file', 'content')
  const up = await fetch(await s.uploadUrl('up.txt', { user: 'root', ...unexpired }), { method: 'POST', body: form })
  assert.deepEqual(await up.json(), [{ name: 'up.txt', path: '/root/up.txt', type: 'file' }])
  const forged = new URL(await s.downloadUrl('secret.txt', unexpired))
  forged.searchParams.set('username', 'root')
  assert.notEqual((await fetch(forged)).status, 200)
})

sandboxTest('git: push, clone and pull over a server inside', async (s) => {
  const author = { authorName: 'Ada', authorEmail: 'ada@example.org' }
  await s.git.init('/tmp/g/repo', { initialBranch: 'main' })
  await s.files.write('/tmp/g/repo/README.md', 'one\n')
  await s.git.add('/tmp/g/repo')
  await s.git.commit('/tmp/g/repo', 'First', author)
  await s.commands.run('git init -q --bare --initial-branch=main /tmp/g/remote.git')
  await s.commands.run('exec git daemon --reuseaddr --base-path=/tmp/g --export-all --enable=receive-pack --listen=127.0.0.1 --port=9420', { background: true })
  await s.commands.run('until </dev/tcp/127.0.0.1/9420; do sleep 0.05; done 2>/dev/null', { timeoutMs: 10_000 })
  await s.git.remoteAdd('/tmp/g/repo', 'origin', 'git://127.0.0.1:9420/remote.git')
  await assert.rejects(s.git.push('/tmp/g/repo', { setUpstream: false }), /no upstream branch/i)
  await s.git.push('/tmp/g/repo', { remote: 'origin', branch: 'main', setUpstream: true })
  await s.git.clone('git://127.0.0.1:9420/remote.git', { path: '/tmp/g/clone' })
  await s.files.write('/tmp/g/repo/README.md', 'two\n')
  await s.git.add('/tmp/g/repo')
  await s.git.commit('/tmp/g/repo', 'Second', author)
  await s.git.push('/tmp/g/repo')
  await s.git.pull('/tmp/g/clone')
  assert.equal(await s.files.read('/tmp/g/clone/README.md'), 'two\n')
})

sandboxTest('metrics keep to the time asked for; logs have a default length', async (s) => {
  const start = new Date()
  const [point] = await eventually(async () => { const m = await s.getMetrics({ start }); return m.length && m }, 'a first point')
  assert.ok(point.memTotal > 0 && point.diskTotal > 0 && point.cpuCount > 0, JSON.stringify(point))
  assert.deepEqual(await s.getMetrics({ start: new Date(+start - 3_600_000), end: new Date(+start - 1_800_000) }), [])
  for (const path of [`/sandboxes/${s.sandboxId}/logs`, `/v2/sandboxes/${s.sandboxId}/logs`, `/v2/sandboxes/${s.sandboxId}/logs?direction=backward`]) {
    const r = await call(path)
    assert.equal(r.status, 200, `${path}: ${await r.text()}`)
  }
})

sandboxTest('what is not there yet says so at once', async (s) => {
  const attempts = {
    'network update': () => s.updateNetwork({ denyOut: ['192.0.2.1'] }),
    'egress rules': () => Sandbox.create({ network: { allowOut: ['192.0.2.1'], denyOut: ['0.0.0.0/0'] } }),
    'private ports': () => Sandbox.create({ network: { allowPublicTraffic: false } }),
    volumes: () => Volume.create('v'),
    secrets: () => Secret.create('NAME', 'value'),
  }
  for (const [what, attempt] of Object.entries(attempts)) {
    await assert.rejects(attempt(), /501.*not supported by this version/, what)
  }
})
