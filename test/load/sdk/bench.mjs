// Measures creates and first commands through the unmodified SDK, and prints lines that benchstat reads.
// Usage: E2B_API_URL=... E2B_SANDBOX_URL=... E2B_API_KEY=... node test/load/sdk/bench.mjs [count]
import { createRequire } from 'node:module'

const { Sandbox } = createRequire(new URL('../../e2e/package.json', import.meta.url))('e2b')
const count = Number(process.argv[2] ?? 30)
const create = []
const both = []
const command = []

for (let i = 0; i < count + 3; i++) {
  const t0 = performance.now()
  const s = await Sandbox.create({ timeoutMs: 60_000 })
  const t1 = performance.now()
  await s.commands.run('true')
  const t2 = performance.now()
  await s.commands.run('true')
  const t3 = performance.now()
  await s.kill()
  await new Promise((r) => setTimeout(r, 1200)) // the pool fills again
  if (i < 3) continue // the first ones warm the client
  create.push(t1 - t0)
  both.push(t2 - t0)
  command.push(t3 - t2)
}

function print(name, samples) {
  const sorted = samples.toSorted((a, b) => a - b)
  const at = (p) => sorted[Math.min(sorted.length - 1, Math.ceil(p * sorted.length) - 1)]
  for (const v of samples) console.log(`Benchmark${name} 1 ${Math.round(v * 1e6)} ns/op`)
  console.log(`# ${name}: p50 ${at(0.5).toFixed(1)} ms, p95 ${at(0.95).toFixed(1)} ms, p99 ${at(0.99).toFixed(1)} ms, n ${samples.length}`)
}

print('SDKCreate', create)
print('SDKCreateAndCommand', both)
print('SDKCommand', command)
