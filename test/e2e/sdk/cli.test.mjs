import assert from 'node:assert/strict'
import { test } from 'node:test'
import { cloister, e2b, eventually, sandboxTest } from './support.mjs'

sandboxTest('the e2b command line lists, describes and measures', async (s) => {
  const list = JSON.parse((await e2b('sandbox', 'list', '--format', 'json')).stdout)
  assert.ok(list.some((x) => x.sandboxId === s.sandboxId), JSON.stringify(list))
  const info = JSON.parse((await e2b('sandbox', 'info', '--format', 'json', s.sandboxId)).stdout)
  assert.equal(info.sandboxId, s.sandboxId)
  await eventually(async () => (await s.getMetrics()).length > 0, 'metrics')
  assert.match((await e2b('sandbox', 'metrics', s.sandboxId)).stdout, /CPU/i)
  await s.commands.run('echo for the log')
  await e2b('sandbox', 'logs', s.sandboxId)
  assert.match((await e2b('template', 'list')).stdout, /base/)
})

sandboxTest('the e2b command line runs commands', async (s) => {
  const r = await e2b('sandbox', 'exec', s.sandboxId, 'echo', 'from', 'the', 'cli')
  assert.match(r.stdout, /from the cli/)
  assert.equal((await e2b('sandbox', 'exec', '-u', 'root', s.sandboxId, 'id', '-u')).stdout.trim(), '0')
})

test('the e2b command line creates and kills', async () => {
  const made = await e2b('sandbox', 'create', '--detach', 'base')
  const id = (made.stdout + made.stderr).match(/\bi[a-z0-9]{19}\b/)?.[0]
  assert.ok(id, made.stdout + made.stderr)
  await e2b('sandbox', 'kill', id)
  const list = JSON.parse((await e2b('sandbox', 'list', '--format', 'json')).stdout)
  assert.ok(!list.some((x) => x.sandboxId === id))
})

sandboxTest('the cloister command line does the same, and more', async (s) => {
  const list = JSON.parse((await cloister('sandbox', 'ls', '-o', 'json')).stdout)
  assert.ok(list.some((x) => x.id === s.sandboxId))
  assert.match((await cloister('sandbox', 'show', s.sandboxId)).stdout, /running/)
  assert.equal((await cloister('sandbox', 'exec', s.sandboxId, 'echo $((6*7))')).stdout, '42\n')
  await assert.rejects(cloister('sandbox', 'exec', s.sandboxId, 'exit 9'), (e) => e.code === 9)
  await cloister('sandbox', 'cp', 'package.json', `${s.sandboxId}:copied.json`)
  assert.match(await s.files.read('copied.json'), /e2b/)
  await cloister('sandbox', 'cp', 'sdk', `${s.sandboxId}:tree`)
  assert.equal(await s.files.exists('tree/cli.test.mjs'), true)
  assert.match((await cloister('template', 'ls')).stdout, /base/)
  assert.match((await cloister('node', 'ls')).stdout, /gvisor/)
  assert.match((await cloister('sandbox', 'logs', s.sandboxId)).stdout, /./)
  assert.match((await cloister('events')).stdout, new RegExp(s.sandboxId))
  const key = JSON.parse((await cloister('key', 'create', 'for a test', '-o', 'json')).stdout)
  assert.match(key.key, /^e2b_[0-9a-f]{40}$/)
  assert.ok(!(await cloister('key', 'ls')).stdout.includes(key.key))
  await cloister('key', 'revoke', key.id)
  await assert.rejects(cloister('sandbox', 'show', 'inothere'), (e) => e.code === 3)
  await cloister('sandbox', 'kill', s.sandboxId)
})
