// Templates from images of a registry, which the test's driver serves on the loopback.
import { BuildError, Sandbox, Template } from 'e2b'
import assert from 'node:assert/strict'
import { test } from 'node:test'
import { removeTemplates, unique, using } from './support.mjs'

const open = process.env.E2E_REGISTRY
const closed = process.env.E2E_PRIVATE_REGISTRY
const credentials = { username: 'reader', password: process.env.E2E_PRIVATE_PASSWORD }

async function built(template, fn) {
  const info = await Template.build(template, unique('image'))
  try {
    return await fn(info)
  } finally {
    await removeTemplates(info.templateId)
  }
}
const outputOf = (template, command) =>
  built(template, (info) => using(Sandbox.create(info.name, { timeoutMs: 120_000 }), async (s) => (await s.commands.run(command)).stdout))

test('an image becomes a template, with its environment', async () => {
  const template = Template().fromImage(`${open}/tiny:latest`).runCmd('echo "$FROM_IMAGE in $(pwd)" > /tmp/said')
  assert.equal(await outputOf(template, 'cat /tmp/said /from-image; echo $HOME'), 'yes in /home/user\nlayer two\n/home/user\n')
})

test('layers hide what lies below', async () => {
  assert.equal(await outputOf(Template().fromImage(`${open}/tiny:latest`), 'cat /gone 2>/dev/null || echo hidden'), 'hidden\n')
})

test('a private image needs the right password', async () => {
  const image = `${closed}/team/tiny:v1`
  assert.equal(await outputOf(Template().fromImage(image, credentials), 'cat /from-image'), 'layer two\n')
  for (const wrong of [undefined, { ...credentials, password: 'guess' }]) {
    const name = unique('image')
    const error = await Template.build(Template().fromImage(image, wrong), name).then(() => assert.fail('it was built'), (e) => e)
    await removeTemplates(name)
    assert.ok(error instanceof BuildError, String(error))
    assert.match(error.message, /unauthorized|denied/i)
    assert.ok(!error.message.includes(credentials.password))
  }
})

test('an image that is not there is said to be missing', async () => {
  const name = unique('image')
  await assert.rejects(Template.build(Template().fromImage(`${open}/nothing:here`), name), (e) => e instanceof BuildError && /nothing/.test(e.message))
  await removeTemplates(name)
})

test('the default base image is this cluster\'s own where the registry cannot be reached', async () => {
  const out = await outputOf(Template().fromBaseImage().runCmd('python3 -c "print(6*7)" > answer'), 'cat answer')
  assert.equal(out, '42\n')
})

test('a Dockerfile', async () => {
  const template = Template().fromDockerfile(`FROM ${open}/tiny:latest
ENV WORD=inside
RUN echo "$WORD" > /tmp/word
WORKDIR /srv
RUN pwd > /tmp/where
`)
  assert.equal(await outputOf(template, 'cat /tmp/word /tmp/where'), 'inside\n/srv\n')
})
