// A caller with @grpc/grpc-js. Prints one JSON object: what it saw of health, reflection and a drain.
// Arguments: target, path of seniority.proto. It prints "going" once its workers have had answers.
const grpc = require('@grpc/grpc-js')
const loader = require('@grpc/proto-loader')

const WORKERS = 32
const [target, proto] = process.argv.slice(2)
const Model = grpc.loadPackageDefinition(loader.loadSync(proto)).SeniorityModel
const same = (bytes) => bytes
const plain = () => grpc.credentials.createInsecure()
const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms))
const seen = {}
let answers = 0

function raw(path, request) {
  const client = new grpc.Client(target, plain())
  return new Promise((resolve) => client.makeUnaryRequest(path, same, same, request,
    (error, answer) => resolve(error ? grpc.status[error.code] : answer.toString('hex'))))
}

function reflect(version) {
  const path = `/grpc.reflection.${version}.ServerReflection/ServerReflectionInfo`
  return new Promise((resolve) => {
    const stream = new grpc.Client(target, plain()).makeBidiStreamRequest(path, same, same)
    stream.on('data', (answer) => { resolve(answer.toString('latin1')); stream.end() })
    stream.on('error', (error) => resolve(error.message))
    stream.write(Buffer.from([0x3a, 0])) // list_services: ""
  })
}

function ask(client, title) {
  const request = { batch: [{ uuid: 1, company: 'grpc-js', title }] }
  return new Promise((resolve) => client.InferSeniority(request, { deadline: Date.now() + 20000 },
    (error, answer) => resolve(error || answer)))
}

async function work(number) {
  const client = new Model(target, plain(), { 'grpc.enable_retries': 0, 'grpc.use_local_subchannel_pool': 1 })
  for (let count = 0; ; count++) {
    const reply = await ask(client, `${number} ${number % 2 ? count : 0}`)
    const hasPushback = reply.metadata && reply.metadata.get('grpc-retry-pushback-ms').length > 0
    const status = reply.batch ? 'OK' : grpc.status[reply.code] + (hasPushback ? ' with pushback' : '')
    seen[status] = (seen[status] || 0) + 1
    if (reply.batch && ++answers === 10 * WORKERS) console.log('going')
    if (!reply.batch && !hasPushback) return
  }
}

async function main() {
  const list = await raw('/grpc.health.v1.Health/List', Buffer.alloc(0))
  const check = await raw('/grpc.health.v1.Health/Check', Buffer.alloc(0))
  const reflected = { v1: await reflect('v1'), v1alpha: await reflect('v1alpha') }
  await Promise.all([...Array(WORKERS).keys()].map(work))
  console.log(JSON.stringify({ list, check, reflected, seen }))
  process.exit(0)
}

main()
