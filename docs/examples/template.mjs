// Makes a template with a web server that runs already when a sandbox begins, and asks it something.
//
//   npm install e2b
//   export E2B_API_URL=http://127.0.0.1:3000 E2B_SANDBOX_URL=http://127.0.0.1:3002 E2B_API_KEY=e2b_...
//   node template.mjs
import { Sandbox, Template, waitForPort } from 'e2b'

const template = Template()
  .fromTemplate('base')
  .setWorkdir('/home/user/site')
  .runCmd('echo "made by a build" > index.html')
  .setEnvs({ GREETING: 'hello' })
  .setStartCmd('python3 -m http.server 8000', waitForPort(8000))

const built = await Template.build(template, 'example-web:v1', {
  tags: ['latest'],
  cpuCount: 1,
  memoryMB: 512,
  onBuildLogs: (entry) => console.log(entry.toString()),
})
console.log('template', built.templateId, 'build', built.buildId)

const sandbox = await Sandbox.create('example-web:latest')
try {
  const page = await sandbox.commands.run('curl -s http://127.0.0.1:8000/')
  console.log(page.stdout.trim())
} finally {
  await sandbox.kill()
}
