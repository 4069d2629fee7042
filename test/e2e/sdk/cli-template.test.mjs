// The official command line and templates.
import assert from 'node:assert/strict'
import { Sandbox, Template } from 'e2b'
import { mkdir, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { test } from 'node:test'
import { call, e2b, inDirectory, removeTemplates, unique, using } from './support.mjs'

const templates = async () => JSON.parse((await e2b('template', 'list', '--format', 'json')).stdout)

test('the e2b command line makes, lists, publishes and deletes a template', async () => {
  const name = unique('cli')
  await inDirectory(async (dir) => {
    await mkdir(join(dir, 'app'))
    await writeFile(join(dir, 'app/file'), 'copied')
    await writeFile(join(dir, 'e2b.Dockerfile'), 'FROM e2bdev/base\nENV WORD=hello\nRUN echo "$WORD" > /word\nCOPY app /app\n')
    const made = await e2b('template', 'create', name, '--path', dir, '--cpu-count', '1', '--memory-mb', '512', '--cmd', 'sleep 1234', '--ready-cmd', 'pgrep -x sleep')
    assert.match(made.stdout + made.stderr, new RegExp(name))
    try {
      await using(Sandbox.create(name), async (s) => {
        assert.equal((await s.commands.run('cat /word /app/file; whoami; pgrep -x sleep | wc -l')).stdout, 'hello\ncopieduser\n1\n')
        assert.equal((await s.getInfo()).cpuCount, 1)
      })
      const listed = (await templates()).find((t) => t.aliases.includes(name) || t.names?.some((n) => n.endsWith(name)))
      assert.ok(listed, 'it is in the list')
      assert.equal(listed.public, false)
      await e2b('template', 'publish', '-y', listed.templateID)
      assert.equal((await templates()).find((t) => t.templateID === listed.templateID).public, true)
      await e2b('template', 'unpublish', '-y', listed.templateID)
      assert.equal((await templates()).find((t) => t.templateID === listed.templateID).public, false)
      await e2b('template', 'delete', '-y', listed.templateID)
      assert.ok(!(await templates()).some((t) => t.templateID === listed.templateID))
      assert.equal(await Template.exists(name), false)
    } finally {
      await removeTemplates(name)
    }
  })
})

test('the e2b command line says why a build failed', async () => {
  const name = unique('cli')
  await inDirectory(async (dir) => {
    await writeFile(join(dir, 'e2b.Dockerfile'), 'FROM e2bdev/base\nRUN echo broken on purpose && exit 9\n')
    const failed = await e2b('template', 'create', name, '--path', dir).then(() => assert.fail('it was built'), (e) => e)
    assert.match(failed.stdout + failed.stderr, /broken on purpose/)
    assert.match(failed.stdout + failed.stderr, /9/)
  })
  await removeTemplates(name)
})

test('the e2b command line pauses, resumes and lists by state', async () => {
  await using(Sandbox.create({ timeoutMs: 120_000 }), async (s) => {
    await e2b('sandbox', 'pause', s.sandboxId)
    const list = async (state) => JSON.parse((await e2b('sandbox', 'list', '--format', 'json', '--state', state)).stdout).map((x) => x.sandboxId)
    assert.ok((await list('paused')).includes(s.sandboxId))
    assert.ok(!(await list('running')).includes(s.sandboxId))
    await e2b('sandbox', 'resume', s.sandboxId)
    assert.ok((await list('running')).includes(s.sandboxId))
    assert.equal((await call(`/sandboxes/${s.sandboxId}`)).status, 200)
  })
})

test('the e2b command line works with snapshots', async () => {
  await using(Sandbox.create({ timeoutMs: 120_000 }), async (s) => {
    await s.files.write('state', 'kept')
    const name = unique('clisnap')
    const made = await e2b('sandbox', 'snapshot', 'create', s.sandboxId, '--name', name)
    try {
      assert.match(made.stdout + made.stderr, new RegExp(name))
      assert.match((await e2b('sandbox', 'snapshot', 'list')).stdout, new RegExp(name))
      await using(Sandbox.create(name), async (copy) => assert.equal(await copy.files.read('state'), 'kept'))
      await e2b('sandbox', 'snapshot', 'delete', name)
      assert.ok(!(await e2b('sandbox', 'snapshot', 'list')).stdout.includes(name))
    } finally {
      await removeTemplates(name)
    }
  })
})
