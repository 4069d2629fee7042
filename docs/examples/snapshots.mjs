// Lets three copies of one sandbox try something each, keeps a snapshot, and pauses and resumes.
//
//   npm install e2b
//   export E2B_API_URL=http://127.0.0.1:3000 E2B_SANDBOX_URL=http://127.0.0.1:3002 E2B_API_KEY=e2b_...
//   node snapshots.mjs
import { Sandbox } from 'e2b'

const sandbox = await Sandbox.create({ timeoutMs: 10 * 60_000 })
try {
  await sandbox.files.write('/home/user/state', 'prepared')

  // Each copy has the files, the memory and the processes of this moment.
  const forks = await sandbox.fork({ count: 3 })
  const answers = await Promise.all(forks.map(async (copy, i) => {
    if (copy instanceof Error) throw copy // each copy has an outcome of its own
    try {
      const run = await copy.commands.run(`echo "$(cat /home/user/state), way ${i}"`)
      return run.stdout.trim()
    } finally {
      await copy.kill()
    }
  }))
  console.log(answers)

  // A snapshot is a template to new sandboxes; this one goes on.
  const snapshot = await sandbox.createSnapshot()
  await sandbox.files.write('/home/user/state', 'changed')
  const earlier = await Sandbox.create(snapshot.snapshotId)
  console.log('in the snapshot:', await earlier.files.read('/home/user/state'))
  await earlier.kill()
  await Sandbox.deleteSnapshot(snapshot.snapshotId)

  // Paused, it takes disk alone; connecting lets it go on.
  await sandbox.pause()
  const again = await Sandbox.connect(sandbox.sandboxId)
  console.log('after the pause:', await again.files.read('/home/user/state'))
} finally {
  await sandbox.kill()
}
