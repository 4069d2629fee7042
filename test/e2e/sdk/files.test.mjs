import { FileNotFoundError, FileType, FilesystemEventType, getSignature } from 'e2b'
import assert from 'node:assert/strict'
import { createHash, randomBytes } from 'node:crypto'
import { eventually, proxy, sandboxTest } from './support.mjs'

sandboxTest('write, read, list, rename, remove', async (s) => {
  const info = await s.files.write('notes/a.txt', 'hello')
  assert.equal(info.path, '/home/user/notes/a.txt')
  assert.equal(await s.files.read('notes/a.txt'), 'hello')
  await s.files.write([{ path: 'notes/b.txt', data: 'b' }, { path: 'notes/c.bin', data: new Uint8Array([0, 255, 1]).buffer }])
  assert.deepEqual(Array.from(await s.files.read('notes/c.bin', { format: 'bytes' })), [0, 255, 1])
  const names = (await s.files.list('notes')).map((e) => e.name).sort()
  assert.deepEqual(names, ['a.txt', 'b.txt', 'c.bin'])
  await s.files.rename('notes/a.txt', 'notes/z.txt')
  assert.equal(await s.files.exists('notes/a.txt'), false)
  assert.equal(await s.files.exists('notes/z.txt'), true)
  const st = await s.files.getInfo('notes/z.txt')
  assert.deepEqual([st.type, st.size, st.owner], [FileType.FILE, 5, 'user'])
  await s.files.remove('notes')
  assert.equal(await s.files.exists('notes'), false)
  await assert.rejects(s.files.read('notes/z.txt'), FileNotFoundError)
})

sandboxTest('directories', async (s) => {
  assert.equal(await s.files.makeDir('x/y/z'), true)
  assert.equal(await s.files.makeDir('x/y/z'), false)
  await s.files.write('x/y/z/deep.txt', '1')
  const deep = await s.files.list('x', { depth: 3 })
  assert.ok(deep.some((e) => e.path === '/home/user/x/y/z/deep.txt'))
  await s.commands.run('ln -s /home/user/x link')
  assert.ok((await s.files.list('link')).length > 0)
})

sandboxTest('a large file arrives whole, both ways', async (s) => {
  const data = randomBytes(20_000_000)
  await s.files.write('big.bin', data.buffer.slice(data.byteOffset, data.byteOffset + data.length))
  const want = createHash('sha256').update(data).digest('hex')
  assert.equal((await s.commands.run('sha256sum big.bin')).stdout.slice(0, 64), want)
  const back = await s.files.read('big.bin', { format: 'bytes' })
  assert.equal(createHash('sha256').update(back).digest('hex'), want)
})

sandboxTest('watch sees what happens below a directory', async (s) => {
  await s.files.makeDir('w')
  const events = []
  const handle = await s.files.watchDir('w', (e) => { events.push(e) }, { recursive: true })
  await s.files.write('w/one.txt', '1')
  await eventually(() => events.some((e) => e.name === 'one.txt' && e.type === FilesystemEventType.CREATE), 'create')
  await s.files.makeDir('w/sub')
  await eventually(() => events.some((e) => e.name === 'sub'), 'the directory')
  await s.files.write('w/sub/two.txt', '2')
  await eventually(() => events.some((e) => e.name === 'sub/two.txt'), 'a file in the new directory')
  await s.files.remove('w/one.txt')
  await eventually(() => events.some((e) => e.name === 'one.txt' && e.type === FilesystemEventType.REMOVE), 'remove')
  await handle.stop()
})

sandboxTest('signed addresses work without a token, and end', async (s) => {
  await s.files.write('signed.txt', 'by signature')
  const url = await s.downloadUrl('signed.txt', { useSignatureExpiration: 60 })
  const r = await fetch(url)
  assert.equal(r.status, 200)
  assert.equal(await r.text(), 'by signature')

  const up = await s.uploadUrl('up.txt')
  const form = new FormData()
  form.append('file', new Blob(['uploaded']), 'up.txt')
  assert.equal((await fetch(up, { method: 'POST', body: form })).status, 200)
  assert.equal(await s.files.read('up.txt'), 'uploaded')

  const bare = await fetch(`${proxy}/files?path=signed.txt&username=user`, { headers: { 'E2b-Sandbox-Id': s.sandboxId, 'E2b-Sandbox-Port': '49983' } })
  assert.equal(bare.status, 401)
  assert.equal(typeof getSignature, 'function')
})

sandboxTest('512 MiB of memory can write gigabytes of files', async (s) => {
  await s.commands.run('for i in 1 2 3 4; do head -c 1073741824 /dev/zero > f$i || exit 1; done; sync', { timeoutMs: 300_000 })
  assert.equal((await s.commands.run('du -sb f1 f2 f3 f4 | awk \'{n+=$1} END {printf "%.0f", n}\'')).stdout.trim(), String(4 * 1073741824))
  assert.equal(await s.isRunning(), true)
}, { timeoutMs: 600_000 })
