// Templates with a start command: their sandboxes begin where the command had come to.
import { BuildError, Sandbox, Template, waitForFile, waitForPort, waitForProcess, waitForTimeout, waitForURL } from 'e2b'
import assert from 'node:assert/strict'
import { test } from 'node:test'
import { eventually, port, removeTemplates, unique, using } from './support.mjs'

const base = () => Template().fromTemplate('base')
async function built(template, fn, opts) {
  const logs = []
  const info = await Template.build(template, unique('started'), { onBuildLogs: (l) => logs.push(l), ...opts })
  try {
    return await fn(info, logs)
  } finally {
    await removeTemplates(info.templateId)
  }
}

test('what the start command has started runs in every sandbox, from the same moment on', async () => {
  const template = base().runCmd('mkdir www && echo served > www/index.html')
    .setStartCmd('cat /proc/sys/kernel/random/uuid > started; echo warming up; exec python3 -m http.server 8000 -d www', waitForPort(8000))
  await built(template, async (info, logs) => {
    assert.match(logs.map(String).join('\n'), /warming up/)
    const made = await Promise.all([0, 1, 2].map(() => Sandbox.create(info.name, { timeoutMs: 120_000, envs: { OWN: 'yes' } })))
    try {
      for (const s of made) assert.equal(await (await port(s, 8000, '/index.html')).text(), 'served\n')
      const started = await Promise.all(made.map((s) => s.files.read('started')))
      assert.equal(new Set(started).size, 1, 'it was started once')
      await made[0].files.write('www/index.html', 'changed')
      assert.equal(await (await port(made[1], 8000, '/index.html')).text(), 'served\n')
      assert.equal((await made[2].commands.run('echo $OWN $E2B_SANDBOX_ID')).stdout, `yes ${made[2].sandboxId}\n`)
      assert.equal(new Set(await Promise.all(made.map((s) => s.commands.run('head -c 8 /dev/urandom | sha256sum').then((r) => r.stdout)))).size, 3)
      await made[0].pause()
      await made[0].connect()
      assert.equal(await (await port(made[0], 8000, '/index.html')).text(), 'changed')
    } finally {
      await Promise.all(made.map((s) => s.kill()))
    }
  })
})

for (const [what, start, ready] of [
  ['a URL', 'exec python3 -m http.server 8001', waitForURL('http://localhost:8001/')],
  ['a process', 'exec sleep 1234', waitForProcess('sleep')],
  ['a file', 'sleep 1; touch /tmp/ready; sleep 1234', waitForFile('/tmp/ready')],
  ['a time', 'sleep 1234', waitForTimeout(1_000)],
  ['a command of its own', 'sleep 0.5; echo ok > /tmp/ok; sleep 1234', 'grep -q ok /tmp/ok'],
]) {
  test(`ready means ${what}`, async () => {
    await built(base().setStartCmd(start, ready), (info) => using(Sandbox.create(info.name), async (s) => {
      const r = await s.commands.run(`${typeof ready === 'string' ? ready : ready.getCmd()} && pgrep -f '1234|http.server' | head -1`)
      assert.match(r.stdout, /\d/)
    }))
  })
}

test('a start command has the user, the directory and the environment of the steps', async () => {
  const template = base().setUser('root').runCmd('mkdir -p /srv/app').setEnvs({ MODE: 'production' }).setWorkdir('/srv/app')
    .setStartCmd('echo "$(whoami) $(pwd) $MODE" > /tmp/as; sleep 1234', waitForFile('/tmp/as'))
  await built(template, (info) => using(Sandbox.create(info.name), async (s) => {
    await eventually(async () => (await s.files.read('/tmp/as')) === 'root /srv/app production\n', 'the start command\'s words', 2_000)
  }))
})

test('a ready command alone holds the template back until it succeeds', async () => {
  await built(base().runCmd('echo there > /tmp/there').setReadyCmd('test -f /tmp/there'), (info) => using(Sandbox.create(info.name), async (s) => {
    assert.equal(await s.files.read('/tmp/there'), 'there\n')
  }))
})

test('a start command that ends badly fails the build', async () => {
  const name = unique('started')
  const error = await Template.build(base().setStartCmd('echo cannot start >&2; exit 3', waitForPort(9999)), name).then(() => assert.fail('it was built'), (e) => e)
  await removeTemplates(name)
  assert.ok(error instanceof BuildError, String(error))
  assert.match(error.message, /3/)
  assert.match(error.stack, /template-start\.test\.mjs/)
})

test('a template made from one with a start command runs its own', async () => {
  await built(base().setStartCmd('echo first > /tmp/who; sleep 1234', waitForFile('/tmp/who')), async (first) => {
    await built(Template().fromTemplate(first.name).runCmd('echo more > more').setStartCmd('echo second > /tmp/who; sleep 1234', waitForFile('/tmp/who')), (second) =>
      using(Sandbox.create(second.name), async (s) => assert.equal((await s.commands.run('cat /tmp/who more')).stdout, 'second\nmore\n')))
  })
})
