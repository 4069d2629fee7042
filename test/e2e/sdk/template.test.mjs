// Template.build and what it makes, from the default template.
import { BuildError, FileUploadError, Sandbox, Template, TemplateError, defaultBuildLogger } from 'e2b'
import assert from 'node:assert/strict'
import { mkdir, symlink, writeFile, chmod } from 'node:fs/promises'
import { join } from 'node:path'
import { test } from 'node:test'
import { call, eventually, inDirectory, removeTemplates, unique, using } from './support.mjs'

/** Builds a template, gives it to fn, and removes it. */
async function built(template, fn, opts = {}, name = unique('built')) {
  const logs = []
  const info = await Template.build(template, name, { onBuildLogs: (l) => logs.push(l), ...opts })
  try {
    return await fn(info, logs)
  } finally {
    await removeTemplates(info.templateId)
  }
}

/** Builds a template and runs a command in a sandbox of it. */
const outputOf = (template, command, opts) =>
  built(template, (info) => using(Sandbox.create(info.name, { timeoutMs: 120_000 }), async (s) => (await s.commands.run(command)).stdout), opts)

test('every kind of step, in order, with logs', async () => {
  const template = Template().fromTemplate('base')
    .setEnvs({ GREETING: 'hello there', OTHER: 'x=y' })
    .runCmd('echo "$GREETING and $OTHER" > said; whoami >> said; pwd >> said')
    .setUser('root')
    .runCmd('echo built by $(whoami) > /built && mkdir -p /app')
    .setWorkdir('/app')
    .runCmd(['pwd > here', 'echo two > second'])
    .runCmd('whoami > /tmp/as', { user: 'user' })
    .makeDir(['/app/a', '/app/b'], { mode: 0o750 })
    .makeSymlink('/built', '/app/link')
    .rename('/app/second', '/app/renamed')
    .remove('/app/b', { recursive: true })
    .setUser('user')
  const before = Date.now()
  await built(template, async (info, logs) => {
    assert.match(info.templateId, /^[a-z0-9]+$/)
    assert.match(info.buildId, /^[0-9a-f-]{36}$/)
    assert.equal(info.name, info.alias)
    const text = logs.map(String).join('\n')
    assert.match(text, /Build started/)
    assert.match(text, /Build finished/)
    assert.match(text, /GREETING/)
    for (const l of logs) assert.ok(l.timestamp instanceof Date && l.timestamp >= before - 5_000 && l.level && l.message !== undefined, text)
    await using(Sandbox.create(info.name, { timeoutMs: 120_000 }), async (s) => {
      const out = async (command) => (await s.commands.run(command)).stdout
      assert.equal(await out('cat /home/user/said'), 'hello there and x=y\nuser\n/home/user\n')
      assert.equal(await out('cat /built /app/link'), 'built by root\nbuilt by root\n')
      assert.equal(await out('cat /app/here /app/renamed /tmp/as'), '/app\ntwo\nuser\n')
      assert.equal(await out('stat -c "%a %U" /app/a; ls -d /app/b 2>&1 | grep -c No'), '750 root\n1\n')
      assert.equal(await out('whoami; pwd'), 'user\n/app\n')
    })
    await using(Sandbox.create(info.templateId), async (s) => assert.equal((await s.commands.run('cat /built')).stdout, 'built by root\n'))
  })
})

test('the size asked for is the sandbox\'s', async () => {
  await built(Template().fromTemplate('base').runCmd('true'), async (info) => {
    await using(Sandbox.create(info.name), async (s) => {
      const r = await s.commands.run("nproc; free -m | awk '/Mem:/ {print $2}'")
      const [cpus, memory] = r.stdout.trim().split('\n').map(Number)
      assert.equal(cpus, 1)
      assert.ok(memory > 600 && memory <= 768, `${memory} MiB`)
      assert.deepEqual([(await s.getInfo()).cpuCount, (await s.getInfo()).memoryMB], [1, 768])
    })
  }, { cpuCount: 1, memoryMB: 768 })
})

test('copies files, directories, globs and links, with owner and mode', async () => {
  await inDirectory(async (dir) => {
    await mkdir(join(dir, 'tree/deep/er'), { recursive: true })
    await mkdir(join(dir, 'glob'))
    await writeFile(join(dir, 'one.txt'), 'one')
    await writeFile(join(dir, 'tool.sh'), '#!/bin/sh\necho tool ran\n')
    await chmod(join(dir, 'tool.sh'), 0o755)
    await writeFile(join(dir, 'tree/top'), 'top')
    await writeFile(join(dir, 'tree/.hidden'), 'hidden')
    await writeFile(join(dir, 'tree/deep/er/leaf'), 'leaf')
    await writeFile(join(dir, 'tree/skipped.log'), 'no')
    await writeFile(join(dir, 'glob/a.py'), 'a')
    await writeFile(join(dir, 'glob/b.py'), 'b')
    await writeFile(join(dir, 'glob/c.txt'), 'c')
    await symlink('top', join(dir, 'tree/link'))
    await writeFile(join(dir, '.dockerignore'), '# nothing that is logged\n**/*.log\n')
    const template = Template({ fileContextPath: dir, fileIgnorePatterns: ['glob/c.txt'] }).fromTemplate('base')
      .copy('one.txt', 'renamed.txt')
      .copy('one.txt', 'into/')
      .copy('tree', '/home/user/tree')
      .copy('glob/*', 'globbed/')
      .copy(['one.txt', 'tool.sh'], '/opt/both/', { user: 'root', mode: 0o500 })
      .copyItems([{ src: 'tool.sh', dest: '/usr/local/bin/tool', user: 'root' }, { src: 'tree/deep', dest: 'deep' }])
      .copy('tree', 'followed', { resolveSymlinks: true })
    await built(template, async (info, logs) => {
      assert.match(logs.map(String).join('\n'), /Uploaded 'tree'/)
      await using(Sandbox.create(info.name, { timeoutMs: 120_000 }), async (s) => {
        const out = async (command) => (await s.commands.run(command)).stdout
        assert.equal(await out('cat renamed.txt into/one.txt'), 'oneone')
        assert.equal(await out('cd tree && find . -type f | sort && cat .hidden deep/er/leaf && readlink link'), './.hidden\n./deep/er/leaf\n./top\nhiddenleaftop\n')
        assert.equal(await out('find globbed -type f -printf "%f\\n" | sort'), 'a.py\nb.py\n')
        assert.equal(await out('sudo stat -c "%n %a %U" /opt/both/one.txt /opt/both/tool.sh'), '/opt/both/one.txt 500 root\n/opt/both/tool.sh 500 root\n')
        assert.equal(await out('tool; stat -c %U /usr/local/bin/tool'), 'tool ran\nroot\n')
        assert.equal(await out('cat deep/er/leaf; stat -c %U renamed.txt tree/top'), 'leafuser\nuser\n')
        assert.equal(await out('test -L followed/link || cat followed/link'), 'top')
      })
    })
  })
})

test('a directory is merged into one that is there, and does not replace it', async () => {
  await inDirectory(async (dir) => {
    await mkdir(join(dir, 'etc'))
    await writeFile(join(dir, 'etc/mine'), 'mine')
    const template = Template({ fileContextPath: dir }).fromTemplate('base').setUser('root').copy('etc', '/etc').setUser('user')
    assert.equal(await outputOf(template, 'cat /etc/mine; test -s /etc/passwd && echo " and the rest"; stat -c %a /etc'), 'mine and the rest\n755\n')
  })
})

test('unchanged files are uploaded once', async () => {
  await inDirectory(async (dir) => {
    await writeFile(join(dir, 'data'), unique('content'))
    const template = () => Template({ fileContextPath: dir }).fromTemplate('base').copy('data', 'data')
    await built(template(), (_, logs) => assert.match(logs.map(String).join('\n'), /Uploaded 'data'/))
    await built(template(), (_, logs) => assert.match(logs.map(String).join('\n'), /Skipping upload of 'data', already cached/))
    const forced = Template({ fileContextPath: dir }).fromTemplate('base').copy('data', 'data', { forceUpload: true })
    await built(forced, (_, logs) => assert.match(logs.map(String).join('\n'), /Uploaded 'data'/))
  })
})

test('steps that were done are not done again, unless asked for', async () => {
  const mark = unique('mark')
  const template = () => Template().fromTemplate('base').runCmd(`echo ${mark} $(cat /proc/sys/kernel/random/uuid) > stamp`)
  const stamp = (info) => using(Sandbox.create(info.name), (s) => s.files.read('stamp'))
  await built(template(), async (first, logs) => {
    assert.doesNotMatch(logs.map(String).join('\n'), /CACHED/)
    const was = await stamp(first)
    await built(template(), async (second, logs) => {
      assert.match(logs.map(String).join('\n'), /CACHED/)
      assert.equal(await stamp(second), was)
    })
    await built(template(), async (third, logs) => {
      assert.doesNotMatch(logs.map(String).join('\n'), /CACHED/)
      assert.notEqual(await stamp(third), was)
    }, { skipCache: true })
    const partly = Template().fromTemplate('base').runCmd('echo first > first').skipCache().runCmd(`echo ${mark} $(cat /proc/sys/kernel/random/uuid) > stamp`)
    await built(partly, async (a) => {
      const was = await stamp(a)
      await built(partly, async (b) => assert.notEqual(await stamp(b), was))
    })
  })
})

test('a template from a template, and a new build under the same name', async () => {
  const name = unique('chain')
  const build = (text, from = 'base') => Template.build(Template().fromTemplate(from).runCmd(`echo ${text} >> trail`), name)
  const read = (from) => using(Sandbox.create(from), (s) => s.files.read('trail'))
  const first = await build('one')
  try {
    await built(Template().fromTemplate(name).runCmd('echo two >> trail'), async (second) => {
      assert.equal(await read(second.name), 'one\ntwo\n')
      const running = await Sandbox.create(name, { timeoutMs: 120_000 })
      try {
        const again = await build('other')
        assert.equal(again.templateId, first.templateId)
        assert.notEqual(again.buildId, first.buildId)
        assert.equal(await read(name), 'other\n')
        assert.equal(await read(second.name), 'one\ntwo\n')
        assert.equal(await running.files.read('trail'), 'one\n')
      } finally {
        await running.kill()
      }
    })
  } finally {
    await removeTemplates(name)
  }
})

test('a failing step says which it was, and where it stands in the program', async () => {
  const name = unique('fails')
  const logs = []
  const template = Template().fromTemplate('base')
    .runCmd('echo fine')
    .runCmd('echo this goes wrong >&2; exit 7')
  const error = await Template.build(template, name, { onBuildLogs: (l) => logs.push(l) }).then(() => assert.fail('it was built'), (e) => e)
  try {
    assert.ok(error instanceof BuildError, String(error))
    assert.match(error.message, /7/)
    assert.match(error.message, /exit 7|goes wrong|failed/)
    const line = error.stack.match(/template\.test\.mjs:(\d+)/)
    assert.ok(line, error.stack)
    const source = (await import('node:fs')).readFileSync(import.meta.filename, 'utf8').split('\n')
    assert.match(source[line[1] - 1], /exit 7/)
    assert.match(logs.map(String).join('\n'), /this goes wrong/)
    assert.ok(logs.some((l) => l.level === 'error'), logs.map(String).join('\n'))
    await assert.rejects(Sandbox.create(name))
  } finally {
    await removeTemplates(name)
  }
})

test('other failures are told as what they are', async () => {
  const attempt = async (template) => {
    const name = unique('fails')
    try {
      return await Template.build(template, name).then(() => assert.fail('it was built'), (e) => e)
    } finally {
      await removeTemplates(name)
    }
  }
  const missing = await attempt(Template().fromTemplate('no-such-template'))
  assert.match(missing.message, /no-such-template/)
  const image = await attempt(Template().fromImage('127.0.0.1:1/no/such:image'))
  assert.ok(image instanceof BuildError, String(image))
  assert.match(image.message, /127\.0\.0\.1:1/)
  const user = await attempt(Template().fromTemplate('base').runCmd('true', { user: 'nobodyhere' }))
  assert.match(user.message, /nobodyhere/)
  assert.throws(() => Template({ fileContextPath: '/tmp' }).fromTemplate('base').copy('../etc/passwd', '/x'), TemplateError)
  await assert.rejects(Template.build(Template({ fileContextPath: '/tmp' }).fromTemplate('base').copy('no-such-file-here', '/x'), unique('fails')), /No files found/)
  for (const name of ['BAD NAME', 'a/b/c/d', '']) await assert.rejects(Template.build(Template().fromTemplate('base'), name), undefined, name)
  for (const bad of [{ cpuCount: 0 }, { memoryMB: 1 }, { memoryMB: 513 }]) {
    await assert.rejects(Template.build(Template().fromTemplate('base'), unique('fails'), bad), /400/, JSON.stringify(bad))
  }
  assert.ok(FileUploadError)
})

test('a build in the background is followed by its status', async () => {
  const info = await Template.buildInBackground(Template().fromTemplate('base').runCmd('for i in 1 2 3 4 5; do echo line $i; done'), unique('background'))
  try {
    const seen = []
    const states = new Set()
    const last = await eventually(async () => {
      const s = await Template.getBuildStatus(info, { logsOffset: seen.length })
      seen.push(...s.logEntries.map((l) => l.message))
      states.add(s.status)
      return ['ready', 'error'].includes(s.status) && s.logEntries.length === 0 && s
    }, 'the build', 60_000)
    assert.deepEqual([last.status, last.buildID, last.templateID, last.logs, last.reason], ['ready', info.buildId, info.templateId, [], undefined])
    for (const s of states) assert.ok(['waiting', 'building', 'ready'].includes(s), s)
    const whole = await Template.getBuildStatus(info)
    assert.deepEqual(whole.logEntries.map((l) => l.message), seen.slice(0, 100))
    assert.deepEqual(seen.filter((m) => /line \d$/.test(m)).length, 5, seen.join('\n'))
    assert.deepEqual((await Template.getBuildStatus(info, { logsOffset: 2 })).logEntries[0].message, seen[2])
    await assert.rejects(Template.getBuildStatus({ templateId: info.templateId, buildId: '00000000-0000-4000-8000-000000000000' }), /404/)
  } finally {
    await removeTemplates(info.templateId)
  }
})

test('long output comes whole, in pages', async () => {
  const template = Template().fromTemplate('base').runCmd('for i in $(seq 1 350); do echo "row $i"; done')
  await built(template, (_, logs) => {
    const rows = logs.map((l) => l.message.match(/row (\d+)$/)?.[1]).filter(Boolean).map(Number)
    assert.deepEqual(rows, Array.from({ length: 350 }, (_, i) => i + 1))
  }, { skipCache: true })
})

test('builds side by side', async () => {
  const infos = await Promise.all([0, 1, 2].map((i) => Template.build(Template().fromTemplate('base').runCmd(`echo ${i} > number`), unique('parallel'))))
  try {
    const numbers = await Promise.all(infos.map((i) => using(Sandbox.create(i.name), (s) => s.files.read('number'))))
    assert.deepEqual(numbers, ['0\n', '1\n', '2\n'])
  } finally {
    await removeTemplates(...infos.map((i) => i.templateId))
  }
})

test('names exist or do not', async () => {
  await built(Template().fromTemplate('base'), async (info) => {
    assert.equal(await Template.exists(info.name), true)
    assert.equal(await Template.aliasExists(info.name), true)
    assert.equal(await Template.exists(unique('none')), false)
  })
  const info = await Template.build(Template().fromTemplate('base'), { alias: unique('legacy'), onBuildLogs: defaultBuildLogger({ minLevel: 'error' }) })
  assert.equal(await Template.exists(info.alias), true)
  assert.equal((await call(`/templates/${info.templateId}`, { method: 'DELETE' })).status, 204)
  assert.equal((await call(`/templates/${info.templateId}`, { method: 'DELETE' })).status, 404)
  assert.equal(await Template.exists(info.alias), false)
})

test('tags name builds', async () => {
  const name = unique('tagged')
  const build = (text, opts, as = name) => Template.build(Template().fromTemplate('base').runCmd(`echo ${text} > version`), as, opts)
  const read = (from) => using(Sandbox.create(from), (s) => s.files.read('version'))
  const tags = async () => Object.fromEntries((await Template.getTags(name)).map((t) => { assert.ok(t.createdAt instanceof Date); return [t.tag, t.buildId] }))
  const first = await build('1', { tags: ['v1', 'stable'] })
  try {
    assert.deepEqual([...first.tags].sort(), ['stable', 'v1'])
    const second = await build('2', undefined, `${name}:v2`)
    assert.ok(second.tags.includes('v2'), JSON.stringify(second))
    assert.equal(await read(`${name}:v1`), '1\n')
    assert.equal(await read(`${name}:stable`), '1\n')
    assert.equal(await read(`${name}:v2`), '2\n')

    const moved = await Template.assignTags(`${name}:v2`, ['stable', 'production'])
    assert.equal(moved.buildId, second.buildId)
    assert.ok(['stable', 'production'].every((t) => moved.tags.includes(t)), JSON.stringify(moved))
    assert.equal(await read(`${name}:stable`), '2\n')
    assert.equal((await tags()).v1, first.buildId)
    assert.equal((await tags()).production, second.buildId)

    await Template.removeTags(name, 'production')
    assert.equal((await tags()).production, undefined)
    await assert.rejects(Sandbox.create(`${name}:production`))
    await Template.removeTags(name, ['v1', 'stable'])
    await assert.rejects(Sandbox.create(`${name}:v1`))
    assert.equal(await read(`${name}:v2`), '2\n')
    await assert.rejects(Template.assignTags(`${name}:none`, 'x'), /404/)
    await assert.rejects(Template.getTags('no-such-template'), /404/)
  } finally {
    await removeTemplates(name)
  }
})
