import { CommandExitError, TimeoutError } from 'e2b'
import assert from 'node:assert/strict'
import { eventually, sandboxTest } from './support.mjs'

sandboxTest('run carries output, exit codes and errors', async (s) => {
  const ok = await s.commands.run('echo out; echo err >&2')
  assert.deepEqual([ok.stdout, ok.stderr, ok.exitCode], ['out\n', 'err\n', 0])
  await assert.rejects(s.commands.run('exit 7'), (e) => e instanceof CommandExitError && e.exitCode === 7)
  await assert.rejects(s.commands.run('no-such-command'), (e) => e instanceof CommandExitError && e.exitCode === 127)
  const chunks = []
  await s.commands.run('for i in 1 2 3; do echo $i; done', { onStdout: (d) => chunks.push(d) })
  assert.equal(chunks.join(''), '1\n2\n3\n')
})

sandboxTest('run honours cwd, envs and user', async (s) => {
  const r = await s.commands.run('pwd; echo $A; whoami', { cwd: '/tmp', envs: { A: 'ä ö' } })
  assert.equal(r.stdout, '/tmp\nä ö\nuser\n')
  assert.equal((await s.commands.run('whoami; echo ~', { user: 'root' })).stdout, 'root\n/root\n')
  assert.equal((await s.commands.run('sudo -n whoami')).stdout, 'root\n')
  await assert.rejects(s.commands.run('true', { cwd: '/no/such/dir' }))
  await assert.rejects(s.commands.run('true', { user: 'nobodyhere' }))
})

sandboxTest('the machine inside has the size that was asked for', async (s) => {
  const r = await s.commands.run("nproc; free -b | awk '/Mem:/ {print $2}'; df -B1 --output=size / | tail -1")
  const [cpus, memory, disk] = r.stdout.trim().split('\n').map(Number)
  assert.equal(cpus, 2)
  assert.ok(memory <= 512 * 1024 * 1024 && memory > 400 * 1024 * 1024, `memory ${memory}`)
  assert.ok(disk >= 9e9 && disk <= 12e9, `disk ${disk}`)
})

sandboxTest('what the template promises is there', async (s) => {
  const r = await s.commands.run('python3 -c "print(6*7)" && python --version && git --version && curl --version | head -1 && bash --version | head -1 && sudo -n id -u')
  assert.match(r.stdout, /^42\nPython 3[^\n]*\ngit version/)
})

sandboxTest('background commands: list, input, connect, kill', async (s) => {
  const cat = await s.commands.run('cat', { background: true, stdin: true })
  await s.commands.sendStdin(cat.pid, 'line one\n')
  await eventually(() => cat.stdout === 'line one\n', 'the echo')
  const list = await s.commands.list()
  assert.ok(list.some((p) => p.pid === cat.pid))
  const again = await s.commands.connect(cat.pid)
  await s.commands.sendStdin(cat.pid, 'line two\n')
  await eventually(() => again.stdout.includes('line two'), 'the second echo')
  await s.commands.closeStdin(cat.pid)
  assert.equal((await cat.wait()).exitCode, 0)

  const sleep = await s.commands.run('sleep 600', { background: true })
  assert.equal(await sleep.kill(), true)
  await assert.rejects(sleep.wait())
  assert.equal(await s.commands.kill(sleep.pid), false)
})

sandboxTest('a command timeout ends the wait', async (s) => {
  await assert.rejects(s.commands.run('sleep 60', { timeoutMs: 1_000 }), TimeoutError)
})

sandboxTest('large output arrives whole', async (s) => {
  const r = await s.commands.run('head -c 3000000 /dev/zero | tr "\\0" x')
  assert.equal(r.stdout.length, 3_000_000)
})

sandboxTest('a pty has a size, takes input and can be resized', async (s) => {
  let out = ''
  const decoder = new TextDecoder()
  const pty = await s.pty.create({ cols: 90, rows: 30, onData: (d) => { out += decoder.decode(d) }, timeoutMs: 30_000 })
  const type = (text) => s.pty.sendInput(pty.pid, new TextEncoder().encode(text))
  await type('stty size\n')
  await eventually(() => out.includes('30 90'), 'the first size')
  await s.pty.resize(pty.pid, { cols: 120, rows: 40 })
  await type('stty size\n')
  await eventually(() => out.includes('40 120'), 'the second size')
  await type('exit 3\n')
  await assert.rejects(pty.wait(), (e) => e.exitCode === 3)
})

sandboxTest('git works', async (s) => {
  await s.git.init('/home/user/repo')
  await s.files.write('/home/user/repo/a.txt', 'hello')
  await s.git.add('/home/user/repo')
  await s.git.configureUser('Ada', 'ada@example.org')
  await s.git.commit('/home/user/repo', 'first')
  const status = await s.git.status('/home/user/repo')
  assert.equal(status.isClean, true)
})
