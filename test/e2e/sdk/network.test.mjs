import { Sandbox } from 'e2b'
import assert from 'node:assert/strict'
import http from 'node:http'
import { call, eventually, proxy, sandboxTest } from './support.mjs'

/** GETs url with headers that fetch would not let through. */
function get(url, headers = {}) {
  return new Promise((resolve, reject) => {
    http.get(url, { headers }, (res) => {
      let body = ''
      res.setEncoding('utf8').on('data', (d) => { body += d }).on('end', () => resolve({ status: res.statusCode, body, headers: res.headers }))
    }).on('error', reject)
  })
}

sandboxTest('a server inside answers by header, by host name and by path', async (s) => {
  await s.files.write('index.html', 'served')
  await s.commands.run('python3 -m http.server 8000', { background: true })
  const byHeader = { 'E2b-Sandbox-Id': s.sandboxId, 'E2b-Sandbox-Port': '8000' }
  await eventually(async () => (await get(proxy + '/index.html', byHeader)).status === 200, 'the server')
  assert.equal((await get(proxy + '/index.html', byHeader)).body, 'served')
  assert.equal((await get(proxy + '/index.html', { Host: `8000-${s.sandboxId}.sandbox.test` })).body, 'served')
  assert.equal((await get(`${proxy}/sandbox/${s.sandboxId}/8000/index.html`)).body, 'served')
})

sandboxTest('errors of the proxy are the contract\'s', async (s) => {
  const closed = await get(proxy + '/', { 'E2b-Sandbox-Id': s.sandboxId, 'E2b-Sandbox-Port': '8123' })
  assert.equal(closed.status, 502)
  const answer = JSON.parse(closed.body)
  assert.equal(answer.sandboxId, s.sandboxId)
  assert.match(answer.message, /port is not open/)
  assert.equal(answer.port, 8123)
  const unknown = await get(proxy + '/', { 'E2b-Sandbox-Id': 'inotthere', 'E2b-Sandbox-Port': '8123' })
  assert.equal(unknown.status, 502)
  assert.match(JSON.parse(unknown.body).message, /The sandbox was not found/)
  for (const path of ['/init', '//init', '/%69nit', '/x/../init']) {
    const r = await fetch(proxy + path, { method: 'POST', headers: { 'E2b-Sandbox-Id': s.sandboxId, 'E2b-Sandbox-Port': '49983' }, body: '{}' })
    assert.ok(r.status === 404 || r.status === 400, `${path}: ${r.status}`)
  }
})

sandboxTest('sandboxes reach neither each other, nor the host, nor metadata services', async (s) => {
  const other = await Sandbox.create({ timeoutMs: 60_000 })
  try {
    const address = (await other.commands.run("hostname -I | awk '{print $1}'")).stdout.trim()
    const gateway = (await s.commands.run("ip route 2>/dev/null | awk '/default/ {print $3}'")).stdout.trim()
    const targets = [`${address}/49983`, '169.254.169.254/80']
    if (gateway) targets.push(`${gateway}/${new URL(process.env.E2B_API_URL).port}`)
    for (const target of targets) {
      const r = await s.commands.run(`timeout 3 bash -c '</dev/tcp/${target}' && echo open || echo shut`)
      assert.equal(r.stdout.trim().split('\n').at(-1), 'shut', target)
    }
  } finally {
    await other.kill()
  }
})

sandboxTest('running out of memory is told, at once', async (s) => {
  const hog = s.commands.run('python3 -c "x = bytearray(2_000_000_000)\nimport time; time.sleep(60)"', { timeoutMs: 60_000 })
  await assert.rejects(hog)
  const info = await (await call(`/v1/sandboxes/${s.sandboxId}`)).json()
  // Python may be refused the memory instead, which ends the command and keeps the sandbox.
  if (info.state !== 'running') {
    assert.equal(info.state, 'failed')
    assert.match(info.reason, /memory/)
  }
  const fill = s.commands.run('python3 -c "\nx=[]\nwhile True: x.append(b\'y\' * 10_000_000)"', { timeoutMs: 60_000 })
  await assert.rejects(fill)
  const after = await eventually(async () => {
    const a = await (await call(`/v1/sandboxes/${s.sandboxId}`)).json()
    return a.state === 'failed' && a
  }, 'the failed state')
  assert.match(after.reason, /memory/)
})
